# %% [markdown]
# # Your training loop
#
# This tutorial trains a network with pseudo-labels in a plain PyTorch loop, in the two stages of
# ConformalSAM. Five names of cpseg are called in the loop: `pseudo_label_loss`, `OnlineThreshold`,
# `self_reliance_weight`, `self_reliance_loss` and `poly_lr`. It needs `pip install
# "cpseg[report]"`.

# %%
import matplotlib.pyplot as plt
import torch
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
    """A network for the start: what takes the place of a foundation model."""
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
# 16 labelled and 100 unlabelled images of spring, and 60 held-out images. Labels of the unlabelled
# images are selected beforehand, at the images' own size: thresholds belong to positions, so crop
# and flip images and labels together afterwards.

# %%
foundation = train(*scenes(200, "autumn", seed=3))
images_x, labels_x = scenes(16, "spring", seed=1)
images_u, hidden = scenes(100, "spring", seed=4)
heldout, heldout_masks = scenes(60, "spring", seed=2)

recalibrator = cpseg.Recalibrator(4, context=())
recalibrator.update(scores_of(foundation, images_x), labels_x)
recalibration = recalibrator.fit()
calibrator = cpseg.Calibrator(
    cpseg.groups.image((24, 32)), alpha=0.2, background=None, recalibration=recalibration
)
calibrator.update(scores_of(foundation, images_x), labels_x)
calibration = calibrator.compute()
labels_u = calibration.pseudo_labels(scores_of(foundation, images_u))

kept = labels_u != 255
right = (labels_u == hidden)[kept].float().mean()
print(f"{100 * cpseg.kept_share(labels_u):.0f} % of pixels have a label, {100 * right:.0f} % right")

# %% [markdown]
# (The map and the thresholds were made from the same 16 images, so no coverage is promised. To keep
# the promise, use some of them for the map and the others for the thresholds. [Two
# sources](two_sources.ipynb) makes better labels.)
#
# ## The parts of the loop
#
# A batch has labelled images x and unlabelled images u. Images u come in two views: a weak one
# (here the image itself) for labels, and a strong one (here with noise and other brightness) for
# learning.

# %%
generator = torch.Generator().manual_seed(0)


def batch_of(*tensors, size=8):
    picks = torch.randint(len(tensors[0]), (size,), generator=generator)
    return [tensor[picks] for tensor in tensors]


def strong(images):
    gain = 0.8 + 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = 0.02 * torch.randn(images.shape, generator=generator)
    return (images * gain + noise).clamp(0, 1)


def held_out_miou(model):
    model.eval()
    guess = scores_of(model, heldout).argmax(1)
    model.train()
    return float(cpseg.mean_iou(cpseg.confusion_matrix(guess, heldout_masks, num_classes=4)))


# %% [markdown]
# - `pseudo_label_loss` is cross-entropy over the pixels that have a label. It is 0, not NaN, where
#   a batch has none. `certainty=` takes weights per pixel (`cpseg.certainty`), if labels shall not
#   count alike.
# - **Stage I** trains on true and selected labels alike.
# - **Stage II** stops using the foundation model, whose errors the student would learn by heart.
#   The labels of u are the student's own, with the small weight of `self_reliance_weight`, which
#   decays to nearly 0.
# - `OnlineThreshold` finds, from the labelled batches, how confident the student must be of a label
#   of its own. In this stage `gate` is the mask of the pixels that are.

# %%
torch.manual_seed(0)
model = network().train()
optimizer = torch.optim.AdamW(model.parameters())
online = cpseg.OnlineThreshold(4, alpha=0.2, decay=0.9, stride=2)
STEPS, STAGE_TWO = 240, 160
history = []

for step in range(STEPS):
    for group in optimizer.param_groups:
        group["lr"] = cpseg.poly_lr(step, STEPS, base_lr=1e-2)
    x, y = batch_of(images_x, labels_x)
    u, selected = batch_of(images_u, labels_u)

    logits_x = model(features(strong(x)))
    loss_x = cpseg.pseudo_label_loss(logits_x, y)
    online.update(logits_x.detach(), y)

    if step < STAGE_TWO:
        loss_u = cpseg.pseudo_label_loss(model(features(strong(u))), selected)
        loss, weight = (loss_x + loss_u) / 2, 0.5
    else:
        with torch.no_grad():
            logits_w = model(features(u))
        own = logits_w.argmax(1).masked_fill(~online.gate(logits_w), 255)
        loss_u = cpseg.pseudo_label_loss(model(features(strong(u))), own, normalize="valid")
        weight = cpseg.self_reliance_weight(step, STEPS, start=STAGE_TWO)
        loss = cpseg.self_reliance_loss(loss_x, loss_u, weight)

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 40 == 39:
        stage = "I" if step < STAGE_TWO else "II"
        history.append((step + 1, held_out_miou(model), float(online.threshold()), weight))
        print(
            f"stage {stage:2} step {step + 1:3}: loss {loss:.3f}, weight of u {weight:.4f}, "
            f"confidence at least {history[-1][2]:.2f}, held-out mIoU {history[-1][1]:.3f}"
        )

# %% [markdown]
# For comparison, the same loop with the 16 labelled images alone, with the same views, rates and
# number of steps:

# %%
torch.manual_seed(0)
alone = network().train()
optimizer = torch.optim.AdamW(alone.parameters())
for step in range(STEPS):
    for group in optimizer.param_groups:
        group["lr"] = cpseg.poly_lr(step, STEPS, base_lr=1e-2)
    x, y = batch_of(images_x, labels_x)
    loss = cpseg.pseudo_label_loss(alone(features(strong(x))), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

print(f"foundation model: held-out mIoU {held_out_miou(foundation):.3f}")
print(f"labelled alone:   held-out mIoU {held_out_miou(alone):.3f}")
print(f"two stages:       held-out mIoU {history[-1][1]:.3f}")

# %%
steps, miou, confidence, weights = zip(*history, strict=True)
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.4), layout="constrained")
left.plot(steps, miou, marker="o", label="held-out mIoU")
left.plot(steps, confidence, marker=".", label="confidence threshold")
left.axvline(STAGE_TWO, color="gray", linestyle=":")
left.set_xlabel("step (dotted: stage II begins)")
left.legend(fontsize=8)
every = range(STAGE_TWO, STEPS)
right.plot(every, [cpseg.self_reliance_weight(n, STEPS, start=STAGE_TWO) for n in every])
right.set_xlabel("step")
right.set_title("self_reliance_weight", fontsize=9)
plt.show()

# %% [markdown]
# The weight of u in stage II is at most 0.01: the stage is mainly training on the labelled images,
# which is to remove what the student took over from wrong labels. Here it changes little. Whether
# it helps, a held-out set must tell. Where labelled images are as few as here, it can also overfit:
# compare the last rows of stage I with those of stage II, and keep the better checkpoint.
#
# ## To your own loop
#
# - Put `network` and `batch_of` away for your model and your `DataLoader`. `cpseg.PseudoLabelled`
#   is a `Dataset` that makes labels on access ([PyTorch](../integrations/pytorch.md)).
# - With several processes call `online.sync()` after `update`, on every rank.
# - `online.state_dict()` belongs into the checkpoint.
# - The threshold promises nothing: the student has seen the labelled pixels that it is computed
#   from.
