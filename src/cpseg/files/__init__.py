"""Formats on disk: score files, masks, id lists, and a data set made of them."""

from cpseg._internal.safe_files import atomic, read_tensors, write_tensors, write_text
from cpseg.core.class_map import ClassMap, parse_class_map, read_class_map
from cpseg.files.dataset import Source
from cpseg.files.id_lists import Pair, read_ids, write_ids
from cpseg.files.masks import VOID, image_size, palette, read_mask, write_mask
from cpseg.files.run_folder import output_path
from cpseg.files.score_files import find_scores, read_scores, write_evidence

__all__ = [
    "VOID",
    "ClassMap",
    "Pair",
    "Source",
    "atomic",
    "find_scores",
    "image_size",
    "output_path",
    "palette",
    "parse_class_map",
    "read_class_map",
    "read_ids",
    "read_mask",
    "read_scores",
    "read_tensors",
    "write_evidence",
    "write_ids",
    "write_mask",
    "write_tensors",
    "write_text",
]
