# %% [markdown]
# # From scores to labels
#
# You have the scores of a foundation model for many images, and true masks of a few. This tutorial
# makes pseudo-labels of the others: look at what is given, calibrate, select labels, and see what
# was kept and how wrong it is. It needs `pip install "cpseg[report]"` and runs in less than a
# minute.

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
# A model that has seen 200 autumn images takes the place of the foundation model. Our images are of
# spring: 40 with true masks, 80 without. (Their masks exist here too, so that we can look up how
# wrong labels are.)

# %%
autumn = scenes(200, "autumn", seed=3)
foundation = train(*autumn)
images, masks = scenes(120, "spring", seed=1)
scores = scores_of(foundation, images)
labelled, unlabelled = slice(0, 40), slice(40, 120)
print("scores", tuple(scores.shape), scores.dtype, "masks", tuple(masks.shape), masks.dtype)

# %% [markdown]
# ## Look at what is given
#
# Most trouble comes from here: logits in place of probabilities, classes in another order, masks
# that begin at 1. Three questions find it. Are the scores in [0, 1]? Which classes occur? Does the
# model agree with the masks? (For files on disk `cpseg check` asks these questions and more.)

# %%
print(f"scores from {scores.min():.3f} to {scores.max():.3f}, sums {scores.sum(1).mean():.3f}")
guess = scores.argmax(1)
confusion = cpseg.confusion_matrix(guess[labelled], masks[labelled], num_classes=4)
print(f"agreement {100 * confusion.diag().sum() / confusion.sum():.0f} %")
print("what the model says for each true class, in percent:")
print(f"{'':10}" + "".join(f"{name:>8}" for name in CLASSES))
for name, row in zip(CLASSES, 100 * confusion / confusion.sum(1, keepdim=True), strict=True):
    print(f"{name:10}" + "".join(f"{share:8.0f}" for share in row.tolist()))

show(images[:3], masks[:3], guess[:3], titles=("image", "true mask", "model's argmax"))

# %% [markdown]
# Rows are true classes. An order of classes that is wrong would show as a permutation of the
# diagonal. Here the order is right: about nine in ten pixels of water, forest and town are
# recognised. But the model takes more than half of the green fields for forest. This is an error of
# the model, not of the files.
#
# ## Calibrate
#
# The nonconformity score of a pixel is 1 − p of its true class. The `Calibrator` keeps these scores
# for every pixel position, and `compute` takes their conformal quantile. `alpha=0.2` asks for sets
# that contain the true class with probability 80 %. No class is a background here, so
# `background=None`.

# %%
calibrator = cpseg.Calibrator(cpseg.groups.pixel((24, 32)), alpha=0.2, background=None)
calibrator.update(scores[labelled], masks[labelled])
calibration = calibrator.compute()
print(calibration.summary(CLASSES))

# %% [markdown]
# The picture has one threshold per position. A large threshold means that the model gave the true
# class little probability there in some labelled images.

# %%
calibration.plot()

# %% [markdown]
# The promise is about the sets. On the new images their coverage can be measured:

# %%
sets = calibration.prediction_set(scores[unlabelled])
covered = 100 * float(cpseg.coverage(sets, masks[unlabelled]))
sizes = float(cpseg.set_size(sets))
print(f"coverage {covered:.1f} % (promised: at least 80 %), {sizes:.2f} classes per set")

# %% [markdown]
# Coverage varies from one draw of the 40 labelled images to another, and is 80 % or more on average
# over such draws. In this draw it is a few points lower, since the pixels of an image, and so
# neighbouring positions, err together.
#
# ## Select labels
#
# A pixel gets the most probable class of its set, and 255 where the set is empty.

# %%
labels = calibration.pseudo_labels(scores[unlabelled])


def wrong(given, true):
    """Share of wrong labels among those kept, in percent."""
    kept = given != 255
    return 100 * float((given != true)[kept].float().mean())


truth = masks[unlabelled]
print(f"argmax: 100.0 % kept, {wrong(guess[unlabelled], truth):.1f} % wrong")
print(f"selected: {100 * cpseg.kept_share(labels):.1f} % kept, {wrong(labels, truth):.1f} % wrong")
show(
    images[unlabelled][:3],
    truth[:3],
    guess[unlabelled][:3],
    labels[:3],
    titles=("image", "true mask", "argmax", "selected"),
)

# %% [markdown]
# Selection with a larger α keeps less. Whether what is left is better depends on the model: does it
# know where it errs?

# %%
for alpha in (0.1, 0.2, 0.3, 0.4, 0.5):
    stricter = cpseg.Calibrator(cpseg.groups.pixel((24, 32)), alpha=alpha, background=None)
    stricter.update(scores[labelled], masks[labelled])
    chosen = stricter.compute().pseudo_labels(scores[unlabelled])
    share = 100 * float(cpseg.kept_share(chosen))
    print(f"alpha {alpha}: {share:5.1f} % kept, {wrong(chosen, truth):4.1f} % wrong")

# %% [markdown]
# Here it does, in part: at α = 0.5 more than half of the pixels keep a label, and about one in ten
# of these is wrong, where of all pixels it is almost one in four. The pixels that are left out are
# the hard ones, so a student never learns them: fewer and cleaner labels are not always better
# labels.
#
# ## How wrong, by class
#
# One number hides which classes are wrong. Of the labels selected above, by the class that they
# name:

# %%
for number, name in enumerate(CLASSES):
    own = labels == number
    share = 100 * float(own.float().mean())
    print(f"{name:8} {share:4.1f} % of pixels, {wrong(labels[own], truth[own]):4.1f} % wrong")

# %% [markdown]
# The model's error remains: of the labels "forest" about four in ten are wrong, and most of the
# fields are missing. No threshold finds a class that the model does not see. What helps is a map
# that learns this error from the labelled images, and a second source: that is the next tutorial,
# [two sources](two_sources.ipynb).
#
# ## Keep it
#
# `calibration.save("c.safetensors")` writes the calibration, and `cpseg.Calibration.load` reads it.
# With images and scores in files, `cpseg run` does all of the above, tries other rules, and
# recommends one.
