# %% [markdown]
# # Two sources
#
# A foundation model has seen many images, but not yours. A student that was trained on your few
# labelled images knows your classes, but has seen little. This tutorial makes labels from both with
# one map, and compares what students learn from different labels. It needs `pip install
# "cpseg[report]"`.

# %%
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch import nn
from torch.nn import functional as F

import cpseg

torch.set_num_threads(1)
CLASSES = ("water", "forest", "field", "town")

# %% [markdown]
# ## The data and the model
#
# The images are simulated maps of water, forest, field and town, taken in any light and haze. In
# autumn fields are yellow, in spring they are green, so that only their texture tells them from
# forest.


# %%
def scenes(count, season, seed):
    """Images [N, 3, 24, 32] in [0, 1] and labels [N, 24, 32]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(count, *shape, generator=generator)

    def smooth(channels, rows, columns):
        return F.interpolate(normal(channels, rows, columns), (24, 32), mode="bicubic")

    labels = smooth(4, 3, 4).argmax(1)
    crop = (0.62, 0.52, 0.25) if season == "autumn" else (0.30, 0.42, 0.22)
    colours = torch.tensor([(0.20, 0.30, 0.45), (0.22, 0.38, 0.20), crop, (0.50, 0.45, 0.45)])
    images = colours[labels].movedim(-1, 1)
    grain = torch.tensor([0.02, 0.08, 0.03, 0.10])[labels][:, None]
    images = images + grain * normal(1, 24, 32)
    light = (0.5 * normal(1, 1, 1) + 0.3 * normal(3, 1, 1)).exp()
    haze = 0.15 * torch.rand(count, 1, 1, 1, generator=generator) * (1 + smooth(1, 2, 3))
    return (images * light + haze + 0.03 * normal(3, 24, 32)).clamp(0, 1), labels


# %% [markdown]
# The network is small: colours, their means and spreads in a window of 5 × 5 pixels and their means
# over the image go through three layers per pixel. It trains in seconds, and stands for your
# network.


# %%
def features(images):
    """Channels [N, 12, H, W] of images [N, 3, H, W]."""
    mean = F.avg_pool2d(images, 5, 1, 2, count_include_pad=False)
    square = F.avg_pool2d(images**2, 5, 1, 2, count_include_pad=False)
    spread = (square - mean**2).clamp(min=1e-6).log() / 4
    whole = images.mean((2, 3), keepdim=True).expand_as(images)
    return torch.cat([images, mean, spread, whole], 1)


def network():
    return nn.Sequential(
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 32, 1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1),
        nn.ReLU(),
        nn.Conv2d(32, len(CLASSES), 1),
    )


def train(images, labels, steps=150):
    """A network, trained by cross-entropy; pixels labelled 255 do not count."""
    torch.manual_seed(0)
    model, inputs = network(), features(images)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (8,))
        loss = cpseg.pseudo_label_loss(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def scores_of(model, images):
    """Probabilities [N, K, H, W]."""
    return model(features(images)).softmax(1)


# %% [markdown]
# One function draws pictures:


# %%
def show(*columns, titles):
    """Images and label maps side by side; pixels without a label are white."""
    paint = ListedColormap(["#3b6ea8", "#2f6b3a", "#d9b44a", "#a05a5a"]).with_extremes(over="white")
    figure, axes = plt.subplots(
        len(columns[0]),
        len(columns),
        figsize=(1.7 * len(columns), 1.35 * len(columns[0]) + 0.4),
        layout="constrained",
    )
    for row, line in enumerate(axes):
        for axis, column, title in zip(line, columns, titles, strict=True):
            panel = column[row]
            panel = panel.movedim(0, -1) if panel.ndim == 3 else panel
            axis.imshow(panel, cmap=paint, vmin=0, vmax=3.5, interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title, fontsize=9)
    figure.legend(
        handles=[Patch(color=paint(k), label=name) for k, name in enumerate(CLASSES)],
        loc="outside lower center",
        ncols=len(CLASSES),
        fontsize=8,
    )
    plt.show()


# %% [markdown]
# The foundation model has seen 200 autumn images. Of spring there are 10 labelled and 100
# unlabelled images; 60 others are held out for the comparison at the end.

# %%
foundation = train(*scenes(200, "autumn", seed=3))
images, masks = scenes(110, "spring", seed=1)
heldout, heldout_masks = scenes(60, "spring", seed=2)
few, rest = slice(0, 10), slice(10, 110)
foundation_scores = scores_of(foundation, images)


def figures(given, true):
    """mIoU and wrong pixels of class maps."""
    confusion = cpseg.confusion_matrix(given, true, num_classes=4)
    wrong = 100 * float((given != true).float().mean())
    return f"mIoU {cpseg.mean_iou(confusion):.3f}, {wrong:4.1f} % wrong"


print("foundation model's labels:", figures(foundation_scores[rest].argmax(1), masks[rest]))

# %% [markdown]
# ## One source, recalibrated
#
# A `Recalibrator` learns from the labelled images how the model errs, as a linear map of its log
# probabilities.

# %%
recalibrator = cpseg.Recalibrator(4, context=())
recalibrator.update(foundation_scores[few], masks[few])
one_map = recalibrator.fit()
one_source = one_map(foundation_scores[rest]).argmax(1)
print("one source, recalibrated:", figures(one_source, masks[rest]))

# %% [markdown]
# ## A student as the second source
#
# The map must see student scores of labelled images as they are on *new* images. A student has
# nearly learned its own images by heart, so each labelled image is scored by a student that did not
# see it: `cross_fit` deals the images into folds by their names. All other images are scored by the
# student of all.

# %%
names = [f"{number:03d}.png" for number in range(10)]
folds = cpseg.cross_fit(names, folds=4)
student = train(images[few], masks[few])
student_scores = scores_of(student, images)
own = student_scores[few].clone()
for fold in range(folds.count):
    seen = [names.index(name) for name in folds.train(fold)]
    held = [names.index(name) for name in folds.held(fold)]
    student_scores[held] = scores_of(train(images[seen], masks[seen]), images[held])
print("on its own images:", figures(own.argmax(1), masks[few]))
print("out of fold:      ", figures(student_scores[few].argmax(1), masks[few]))
print("on new images:    ", figures(student_scores[rest].argmax(1), masks[rest]))

# %% [markdown]
# On its own images the student looks much better than it is. Out of fold it is nearer to what it is
# on new images, and on the low side, since the student of a fold has seen fewer images.
#
# ## One map over both

# %%
recalibrator = cpseg.Recalibrator(4, context=())
recalibrator.update([foundation_scores[few], student_scores[few]], masks[few])
both_map = recalibrator.fit()
both = both_map([foundation_scores[rest], student_scores[rest]]).argmax(1)
print("two sources, one map:", figures(both, masks[rest]))
show(
    images[rest][:3],
    masks[rest][:3],
    foundation_scores[rest][:3].argmax(1),
    student_scores[rest][:3].argmax(1),
    both[:3],
    titles=("image", "true mask", "foundation", "student", "both"),
)

# %% [markdown]
# ## What students learn from them
#
# The same network is trained on the labelled images and the other 100 with each kind of labels, and
# measured on held-out images. The last row has the true masks, which nobody has in practice.

# %%
kinds = {
    "foundation's argmax": foundation_scores[rest].argmax(1),
    "one source, recalibrated": one_source,
    "student's own argmax": student_scores[rest].argmax(1),
    "two sources, one map": both,
    "true masks": masks[rest],
}
print(f"{'labelled alone':28}", figures(scores_of(student, heldout).argmax(1), heldout_masks))
predictions = {}
for kind, labels in kinds.items():
    taught = train(images, torch.cat([masks[few], labels]))
    predictions[kind] = scores_of(taught, heldout).argmax(1)
    print(f"{'+ ' + kind:28}", figures(predictions[kind], heldout_masks))

# %%
show(
    heldout[:3],
    heldout_masks[:3],
    scores_of(student, heldout[:3]).argmax(1),
    predictions["foundation's argmax"][:3],
    predictions["two sources, one map"][:3],
    titles=("held-out image", "true mask", "labelled alone", "+ foundation", "+ two sources"),
)

# %% [markdown]
# The foundation model's raw labels make the student worse than the labelled images alone: it learns
# the error that the model makes everywhere. Labels from two sources make it better. The numbers are
# of one run each: read a difference of one hundredth as noise.
#
# It does not always help, and a comparison like this one needs masks that you do not have. Before
# you train, `cpseg.recommend` (or `cpseg report` for files) measures by cross-validation on the
# labelled images which labels are better than the student's own, and says so if none are. [Labels
# for a student](../student.md) goes on from here: more labelled images, an encoder's features,
# trees.
#
# ## What is promised
#
# Nothing yet: these are labels without sets. To keep the promises, fit the students and the map on
# some labelled images and calibrate on others. Scores out of fold come close, and prove nothing.
# [Certificate and audit](certificate_and_audit.ipynb) shows how to prove that labels are good.
