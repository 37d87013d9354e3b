"""The scores of one model on disk: where they lie and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cpseg._internal.checks import message
from cpseg.core.class_map import ClassMap, parse_class_map
from cpseg.core.score_reading import ScoreReading, parse_reading
from cpseg.files.score_arrays import OF_ALL_IMAGES
from cpseg.files.score_files import PLAIN


class ScoreFolder(NamedTuple):
    """The score files of one more model.

    Attributes:
        probs: the folder, or one file with the scores of all images.
        class_map: from the model's classes to those wanted, or None to take them as they are.
        reading: layout, logits and resolution of its scores.
    """

    probs: Path
    class_map: ClassMap | None = None
    reading: ScoreReading = PLAIN

    @property
    def is_one_file(self) -> bool:
        """Whether one file holds the scores of all images."""
        return self.probs.suffix in OF_ALL_IMAGES and self.probs.is_file()

    def with_recorded_reading(self, recorded: Any) -> ScoreFolder:
        """The folder read as it was for a calibration, as JSON or None.

        Raises:
            ValueError: it is to be read in another way.
        """
        if recorded is None:
            return self
        reading = parse_reading(recorded)
        if not self.reading.is_plain and self.reading != reading:
            fix = "leave --layout, --logits and --upsample out: the calibration carries them"
            expected, got = f"scores read as calibrated, {reading.to_json()}", "another way"
            raise ValueError(message(str(self.probs), expected, got, fix))
        return self._replace(reading=reading)

    def with_recorded_map(self, recorded: Any) -> ScoreFolder:
        """The folder with the class map that a calibration was made with, as JSON or None.

        Raises:
            ValueError: it has another one.
        """
        if recorded is None:
            return self
        class_map = parse_class_map(recorded)
        if self.class_map is not None and self.class_map != class_map:
            fix = "leave --class-map out: the calibration carries it"
            raise ValueError(message("class map", "that of the calibration", "another one", fix))
        return self._replace(class_map=class_map)


def as_json(class_map: ClassMap | None) -> dict[str, Any] | None:
    """A class map as it is recorded."""
    return None if class_map is None else class_map.to_json()
