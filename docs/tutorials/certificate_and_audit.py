# %% [markdown]
# # Certificate and audit
#
# A calibration promises that the prediction *set* contains the true class. It does not say how many
# of the labels that you keep are wrong. Two things do:
#
# - a **certificate**, proven on labelled images, about the labels of images like these;
# - an **audit**, proven by a person's answers about drawn pixels, about exactly the labels that
#   exist.
#
# This tutorial makes both, and then breaks the assumption of the first.

# %%
import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

import cpseg
from cpseg.certification import audit_sample
from cpseg.demo import digit_scenes

torch.set_num_threads(1)

# %% [markdown]
# ## Images, and a simulated model
#
# The images are scenes of handwritten digits (`pip install "cpseg[demo,report]"`); classes are
# paper and the ten digits, 255 is void. The model is simulated, so that we know its errors: it sees
# the true labels through noise that differs from image to image. With `noise=1.0` it works as
# usual, with more it works badly.

# %%
generator = torch.Generator().manual_seed(0)


def model(labels, noise=1.0):
    """Probabilities float32 [N, 11, H, W] for true labels [N, H, W]."""
    count, height, width = labels.shape
    seen = F.one_hot(labels.masked_fill(labels == 255, 0), 11).movedim(-1, 1).float()
    blobs = torch.randn(count, 11, height // 8, width // 8, generator=generator)
    blobs = F.interpolate(blobs, (height, width), mode="bilinear")
    strength = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    return (5 * seen + 2 * noise * strength * blobs).softmax(1)


pictures, masks = digit_scenes(180, domain="source", seed=0)
labels = torch.from_numpy(masks)[:, 1::2, 1::2].long()  # every second pixel is enough here
probs = model(labels)
calibrating, certifying, new = slice(0, 40), slice(40, 140), slice(140, 180)


def error(given, true):
    """Wrong labels among those kept, in percent."""
    known = (true != 255) & (given != 255)
    return 100 * float(((given != true) & known).sum() / known.sum())


print(f"raw argmax on new images: {error(probs[new].argmax(1), labels[new]):.1f} % wrong")

# %% [markdown]
# ## The certificate
#
# Of the labelled images, 40 set thresholds, and 100 others certify: with the same images in both
# parts nothing would be proven. The question is fixed beforehand: "of all labels kept, at most 5 %
# are wrong", with 90 % confidence. The `Certifier` tries rules from strict to loose, and returns
# the loosest one for which this is proven. `learn_order` lets the first 40 images say at which rule
# to start.

# %%
calibrator = cpseg.Calibrator(cpseg.groups.image((48, 64)), alpha=0.995)
calibrator.update(probs[calibrating], labels[calibrating])
certifier = cpseg.Certifier(calibrator, max_error=0.05, delta=0.1)
certifier.learn_order(probs[calibrating], labels[calibrating])
certifier.update(probs[certifying], labels[certifying])
calibration = certifier.compute()
print(calibration.certificate)

# %% [markdown]
# The sentence holds over the draw of the certification images: if the whole procedure were repeated
# with other images of the same kind, it would issue a false certificate in at most one of ten
# repetitions. Here the true labels of 40 new images are known, so we can look. The picture shows
# the image with most wrong labels:

# %%
selected = calibration.pseudo_labels(probs[new])
kept = 100 * float(cpseg.kept_share(selected))
print(f"certified rule: {kept:.1f} % of pixels kept, {error(selected, labels[new]):.2f} % wrong")

shown, axes = plt.subplots(1, 4, figsize=(9, 2), layout="constrained")
wrong = (selected != labels[new]) & (selected != 255) & (labels[new] != 255)
worst = int(wrong.sum((1, 2)).argmax())
true = labels[new][worst]
panels = {
    "image": pictures[new][worst],
    "true labels": true.masked_fill(true == 255, 11),
    "labels kept (white: none)": selected[worst].masked_fill(selected[worst] == 255, 11),
    "wrong labels": wrong[worst].long() * 3,
}
for axis, (title, panel) in zip(axes, panels.items(), strict=True):
    colours = plt.get_cmap("tab10", 12).copy()
    colours.set_over("white")
    axis.imshow(panel, cmap=colours, vmin=0, vmax=10.5)
    axis.set_title(title, fontsize=9)
    axis.set_axis_off()
plt.show()

# %% [markdown]
# A stricter question needs more images. A certificate that cannot be issued says why, and keeps
# nothing:

# %%
print(certifier.compute(max_error=0.001).certificate)

# %% [markdown]
# ## Other images: what a certificate does not say
#
# The certificate is about images like the certification images. Now the model meets images on which
# it works badly. The rule is the same, and no error is reported, since nothing in the probabilities
# tells.

# %%
shifted = model(labels[new], noise=2.0)
selected_shifted = calibration.pseudo_labels(shifted)
kept = 100 * float(cpseg.kept_share(selected_shifted))
wrong_share = error(selected_shifted, labels[new])
print(f"shifted images: {kept:.1f} % of pixels kept, {wrong_share:.1f} % wrong; certified: 5 %")

# %% [markdown]
# The error is now far above the 5 % that was certified. The certificate is not false: it said
# nothing about these images.
#
# ## The audit
#
# An audit assumes nothing about images or model. The labels exist; `audit_sample` draws pixels at
# random among all labels kept, and a person says which are right. Here the true masks answer in the
# person's place, and void pixels count as unsure. (`cpseg audit` does this for files, with a page
# to click on.)


# %%
def audit(selected, true, max_error):
    names = [str(number) for number in range(len(selected))]
    plan = audit_sample(names, lambda name: selected[int(name)], max_error=max_error, seed=0)
    answers = {}
    for number, draw in enumerate(plan.draws):
        truth = int(true[int(draw.image), draw.row, draw.column])
        word = "yes" if truth == draw.label else "no"
        answers[number] = "unsure" if truth == 255 else word
    return plan, plan.result(answers, unsure="skip")


for title, chosen in (("like the others", selected), ("shifted", selected_shifted)):
    plan, result = audit(chosen, labels[new], max_error=0.05)
    print(f"{title}: {plan}")
    print(f"  {result.wrong} wrong of {result.answers} answers, at most {100 * result.bound:.1f} %")
    print(f"  certified at 5 %: {result.certified}")

# %% [markdown]
# A few hundred answers bound the error of the labels of the usual images, and for the shifted
# images they show that it is larger than 5 %. The seed is fixed here so that the text stays true;
# leave it out in real work, because a draw must not be known before the labels are made.
#
# ## What is true, and what is not promised
#
# | statement | proven by | under which assumption |
# |---|---|---|
# | the set of a new image contains the true class with probability 1 − α | `Calibrator` | labelled and new images are exchangeable |
# | of all labels kept on images like these, at most 5 % are wrong | `Certifier` | images are i.i.d.; the certification images were used for nothing else |
# | of exactly these labels, at most so many are wrong | audit | the answers are right |
# | the labels of *other* images are right | nothing | |
# | a student that is trained on these labels gets better | nothing | measure it |
#
# Void pixels are another limit. Certificates take them to be like the labelled pixels of their
# image, and with `unsure="skip"` the audit is about labels that a person can judge. [Certificates
# and audits](../theory/certificates.md) has the reasons.
