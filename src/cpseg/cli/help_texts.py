"""What ``cpseg COMMAND --help`` says besides its options: the purpose, and an example."""

from __future__ import annotations

from typing import NamedTuple


class HelpText(NamedTuple):
    """What a subcommand is for, and a line to copy."""

    description: str
    example: str


HELP_TEXTS = {
    "demo": HelpText(
        "Makes scenes of handwritten digits, a model from a cleaner domain, labels by several "
        "rules, and students trained on them. Ends with a table, pictures, and data to try "
        "commands on.",
        "cpseg demo -o demo_out",
    ),
    "run": HelpText(
        "Looks at the data (cpseg check), finds by cross-validation on the labelled images the "
        "rule that serves best (cpseg report), makes it (cpseg calibrate or certify) and labels "
        "the other images with it (cpseg label). Every step is printed as the command that does "
        "it. A run that was stopped goes on.",
        "cpseg run --root data --labelled labelled.txt --unlabelled unlabelled.txt --probs "
        "scores -o out",
    ),
    "check": HelpText(
        "Looks at lists, masks and scores for some seconds, names what is wrong and the option "
        "that cures it, and draws three images. Exit 2 where no job can work.",
        "cpseg check --root data --ids labelled.txt --probs scores --unlabelled unlabelled.txt",
    ),
    "calibrate": HelpText(
        "Makes a rule from labelled images: thresholds of prediction sets at --alpha (eq. 4 of "
        "ConformalSAM), or with --alpha none the most probable class of every pixel. With "
        "--recalibrate the probabilities first go through a map fitted on these images.",
        "cpseg calibrate --root data --ids labelled.txt --probs scores --background none "
        "--alpha none --recalibrate dirichlet -o rule.safetensors",
    ),
    "label": HelpText(
        "Writes the pseudo-labels of a calibration as 8-bit masks, and lists for training code.",
        "cpseg label --root data --ids unlabelled.txt --probs scores --calibration "
        "rule.safetensors --labelled labelled.txt -o labels",
    ),
    "evaluate": HelpText(
        "Measures a calibration's labels, the raw argmax and a constant threshold on labelled "
        "images that made none of them.",
        "cpseg evaluate --root data --ids heldout.txt --probs scores --calibration "
        "rule.safetensors",
    ),
    "certify": HelpText(
        "Finds the loosest rule for which it is proven, with confidence 1 - delta, that at most "
        "--max-error of the labels kept are wrong. Exit 1 where none can be proven.",
        "cpseg certify --root data --ids labelled.txt --probs scores --background none "
        "--max-error 0.05 --recalibrate dirichlet -o certified.safetensors",
    ),
    "audit": HelpText(
        "Draws pixels of finished labels, writes a page on which you say whether they are "
        "right, and bounds the error of exactly these labels by the answers. It needs no "
        "labelled images.",
        "cpseg audit labels --plan",
    ),
    "sweep": HelpText(
        "Measures recalibrations, alphas, variants and background rules by cross-validation, "
        "and prints the ten best.",
        "cpseg sweep --root data --ids labelled.txt --probs scores --backgrounds none,0 -o sweep",
    ),
    "report": HelpText(
        "Writes one page that recommends a rule, with the commands that make it, measured by "
        "cross-validation on labelled images.",
        "cpseg report --root data --ids labelled.txt --probs scores --background none -o "
        "report.html",
    ),
    "folds": HelpText(
        "Deals labelled images into folds, with lists to train a student of each, and puts the "
        "students' scores together so that every image is scored by one that did not see it.",
        "cpseg folds --ids labelled.txt --folds 4 -o folds",
    ),
    "compact": HelpText(
        "Turns score files into evidence files of 9 bytes a pixel, from which the same labels "
        "are selected.",
        "cpseg compact --root data --ids unlabelled.txt --probs scores --background none -o "
        "evidence",
    ),
    "predict": HelpText(
        "Writes score files with a model of transformers, from the hub or a folder.",
        "cpseg predict --model facebook/sam3 --images data/images --classes classes.txt "
        "--background-from complement -o scores",
    ),
    "export": HelpText(
        "Writes the labels of a folder for an annotation tool, where people correct them, or as "
        "GeoTIFF with the place of the images. Void pixels stay void.",
        "cpseg export labels --to cvat --names classes.txt --draw 40 -o labels.zip",
    ),
    "import": HelpText(
        "Reads masks that people corrected in an annotation tool into a folder with a list that "
        "cpseg calibrate --ids takes.",
        "cpseg import corrected.zip --from cvat --labels labels --names classes.txt -o corrected",
    ),
    "patch": HelpText(
        "Prints a patch for a client's training code: Stage I and II of ConformalSAM, or a "
        "conformal threshold, in UniMatch, UniMatch-V2 or AllSpark. Stages need no cpseg in the "
        "client's environment.",
        "cpseg patch unimatch-stage2",
    ),
}
