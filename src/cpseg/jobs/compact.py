"""The job ``cpseg compact``: evidence files in place of probability maps."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from cpseg._internal.checks import name_file_in_errors
from cpseg._internal.distributed import rank, shard
from cpseg._internal.hashing import digest
from cpseg._internal.threads import in_order
from cpseg.calibration.calibration import Calibration
from cpseg.core.selection import evidence
from cpseg.files.dataset import Progress, Source, as_json, fingerprint, quiet
from cpseg.files.id_lists import Pair
from cpseg.files.run_folder import open_run_folder, output_paths
from cpseg.files.score_files import write_evidence
from cpseg.files.score_folder import carry_record
from cpseg.jobs.sources import as_calibrated


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
        ValueError: bad settings or files, or a folder that holds another run or is in use.
        OSError: a file that cannot be read or written.
    """
    out = Path(out)
    pairs = source.read_ids(ids, columns=1)
    recalibration = None
    if calibration is not None:
        source = as_calibrated("compact", source, calibration)
        recalibration = calibration.to(source.device).recalibration
    settings: dict[str, object] = {"background": background, "map": as_json(source.class_map)}
    if recalibration is not None:
        settings["recalibration"] = recalibration.fingerprint
    files = source.locate(pairs)
    outputs = output_paths("compact", out, pairs, ".safetensors", kind="evidence")
    run = digest({**settings, **source.identity()})
    with open_run_folder(out, run) as folder:
        if rank() == 0:
            carry_record(source.folders, out)

        def make(pair: Pair) -> bool:
            inputs, output = files[pair], outputs[pair]
            if folder.is_up_to_date(output, *inputs):
                return False
            stamps = folder.stamps(*inputs)
            probs = source.probabilities(inputs)
            with name_file_in_errors(inputs[0]):
                if recalibration is not None:
                    found = recalibration.evidence(probs, background=background)
                else:
                    found = evidence(probs, background=background)
            write_evidence(output, replace(found, class_map=fingerprint(source.class_map)))
            folder.record(output, inputs, stamps)
            return True

        mine, count = shard(pairs)
        with closing(in_order(make, mine, source.workers)) as made:
            counted = zip(progress(mine, count, "compact"), made, strict=True)
            written = sum(is_new for _, is_new in counted)
    return written
