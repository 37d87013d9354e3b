"""The job ``cpseg compact``: evidence files in place of probability maps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cpseg._internal.checks import name_file_in_errors
from cpseg._internal.distributed import barrier, shard
from cpseg._internal.hashing import digest
from cpseg.calibration.calibration import Calibration
from cpseg.core.selection import evidence
from cpseg.files.dataset import Progress, Source, fingerprint, quiet
from cpseg.files.id_lists import read_ids
from cpseg.files.run_folder import is_up_to_date, open_run_folder, output_paths
from cpseg.files.score_files import write_evidence


def compact(
    source: Source,
    ids: str | Path,
    out: str | Path,
    *,
    background: int | None,
    calibration: Calibration | None = None,
    progress: Progress = quiet,
) -> int:
    """Turn the probabilities of an id list into evidence files, skipping those that are there.

    Args:
        source: the data set and the probabilities.
        ids: id list; a second column is not read.
        out: the folder to write, laid out like the folder of probabilities.
        background: index of the dominant class that selection will suppress, or None.
        calibration: one whose class map and recalibration the probabilities go through, or None.
        progress: wraps the loop over images.

    Returns:
        The number of files written by this rank.

    Raises:
        ValueError: bad settings or files, or a folder that holds another run.
        OSError: a file that cannot be read or written.
    """
    out = Path(out)
    pairs = read_ids(ids, columns=1)
    recalibration = None
    if calibration is not None:
        source = source.with_recorded_class_map(calibration.provenance.class_map)
        recalibration = calibration.to(source.device).recalibration
    class_map = source.class_map and source.class_map.to_json()
    settings: dict[str, object] = {"background": background, "map": class_map}
    if recalibration is not None:
        settings["recalibration"] = recalibration.fingerprint
    paths = source.locate(pairs)
    outputs = output_paths("compact", out, pairs, ".safetensors", kind="evidence")
    open_run_folder(out, digest({**settings, "probs": str(source.probs.resolve())}))
    written = 0
    for pair in progress(*shard(pairs), "compact"):
        if is_up_to_date(outputs[pair], paths[pair]):
            continue
        probs = source.probabilities(paths[pair])
        with name_file_in_errors(paths[pair]):
            if recalibration is not None:
                compacted = recalibration.evidence(probs, background=background)
            else:
                compacted = evidence(probs, background=background)
        write_evidence(outputs[pair], replace(compacted, class_map=fingerprint(source.class_map)))
        written += 1
    barrier()
    return written
