"""mIoU that the ConformalSAM paper (ICCV 2025) reports, by data set, table, row and list folder.

Folders of id lists are named by their number of labelled images.
"""

from __future__ import annotations

_SPLITS = ("92", "183", "366", "732")
_TABLE5 = {
    "-": (52.89, 69.35, 72.37, 74.22),
    "SEEM": (42.00, 41.90, 42.37, 44.99),
    "SEEM + SR": (65.94, 70.67, 70.52, 71.89),
    "SEEM + CP": (78.09, 78.23, 78.32, 79.10),
    "SEEM + CP + SR": (81.21, 82.22, 81.84, 83.52),
}
_TABLE8 = {  # ADE20K, the counterpart of table 5
    "SEEM": (20.64, 20.53, 21.01, 21.45),
    "SEEM + SR": (25.97, 29.53, 32.81, 34.30),
    "SEEM + CP": (20.72, 20.82, 21.19, 21.59),
    "SEEM + CP + SR": (26.21, 30.02, 33.33, 34.64),
}
_TABLE6 = {
    "Pixel 0.1": (74.31, 75.95),
    "Pixel 0.05": (78.09, 79.10),
    "Pixel 0.01": (68.01, 54.04),
    "Image 0.1": (75.99, 77.47),
    "Image 0.05": (75.54, 76.27),
    "Image 0.01": (44.59, 44.10),
    "K-Means 0.1": (69.36, 78.23),
    "K-Means 0.05": (69.13, 77.02),
    "K-Means 0.01": (44.16, 38.71),
    "GenAnn 0.1": (75.41, 77.25),
    "GenAnn 0.05": (73.72, 75.88),
    "GenAnn 0.01": (46.80, 43.44),
}
_TABLE9 = {
    "voc": (
        _SPLITS,
        {
            "Confidence=0.7": (43.67, 41.84, 45.78, 48.66),
            "SEEM+CP": (78.09, 78.23, 78.32, 79.10),
        },
    ),
    "ade20k": (
        ("316", "632", "1263", "2526"),
        {
            "Confidence=0.7": (20.19, 20.57, 20.73, 21.54),
            "SEEM+CP": (20.72, 20.82, 21.19, 21.59),
        },
    ),
}
_TABLE11 = {"SEEM": (30.29, 30.26, 30.32, 30.34), "SEEM+CP": (73.25, 73.33, 73.27, 73.59)}

_SOURCES = [
    ("voc", "table5", _SPLITS, _TABLE5),
    ("ade20k", "table5", ("158", "316", "632", "1263"), _TABLE8),
    ("voc", "table6", ("92", "732"), _TABLE6),
    *((name, "table9", splits, rows) for name, (splits, rows) in _TABLE9.items()),
    ("voc", "table11", _SPLITS, _TABLE11),
]
PAPER: dict[tuple[str, str, str | None, str], float] = {
    (dataset, table, row, split): value
    for dataset, table, splits, rows in _SOURCES
    for row, values in rows.items()
    for split, value in zip(splits, values, strict=True)
}
