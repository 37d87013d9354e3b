# %% [markdown]
# # Testing your claim
#
# You have code of your own that makes prediction sets, and you say "they contain the true class
# with probability 90 %". This tutorial tests such a claim with `cpseg.testing`. A right
# implementation passes, and a wrong one fails with a counterexample. The assertions share no code
# with the rest of cpseg and take any callables, so they also test code that does not use cpseg.

# %%
import math

import torch

import cpseg
from cpseg.testing import assert_coverage, assert_leave_one_out, assert_selection_law


def outcome(assertion, *arguments, **options):
    """Print whether an assertion holds, and what it says if not."""
    try:
        assertion(*arguments, **options)
        print("passed")
    except AssertionError as error:
        print(f"failed: {error}")


# %% [markdown]
# ## Two quantiles
#
# From the scores of n labelled images, a threshold is computed that the score of a new image
# exceeds with probability α at most. The first function takes the ⌈n(1 − α)⌉-th smallest score. It
# looks right, and many scripts do it. The second one counts the new image too.


# %%
def forgets_the_new_image(scores, alpha):
    rank = math.ceil(len(scores) * (1 - alpha))
    return scores.sort().values[rank - 1]


def counts_the_new_image(scores, alpha):
    rank = math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)
    return scores.sort().values[rank - 1] if rank <= len(scores) else torch.tensor(math.inf)


# %% [markdown]
# `assert_leave_one_out` needs no data. Of any n + 1 numbers, at least ⌈(n + 1)(1 − α)⌉ must be at
# most the quantile of the other n. This is the theorem behind coverage, without its randomness. All
# small cases are tried, and the first that fails is shown.

# %%
outcome(assert_leave_one_out, forgets_the_new_image)
outcome(assert_leave_one_out, counts_the_new_image)

# %% [markdown]
# A right quantile does not make a right procedure. The scores may be read at the wrong pixel, or
# the sets compared with `<` in place of `<=`. So test the whole procedure, from probabilities to
# sets.
#
# ## Your own data
#
# `assert_coverage` takes `draw(generator, m)`, which returns m images with their labels. Draw from
# your own labelled images *without* replacement: then they are exchangeable, which is all that the
# theorem asks for. Here the pool is 60 images of 4 × 6 pixels with the probabilities of some model
# for 3 classes; put your own tensors in place of them.

# %%
generator = torch.Generator().manual_seed(0)
pool_labels = torch.randint(3, (60, 4, 6), generator=generator)
hot = torch.nn.functional.one_hot(pool_labels, 3).movedim(-1, 1)
noise = torch.randn(60, 3, 4, 6, generator=generator)
pool_probs = (1.5 * hot + noise).softmax(1)


def draw(generator, m):
    picks = torch.randperm(len(pool_labels), generator=generator)[:m]
    return pool_probs[picks], pool_labels[picks]


# %% [markdown]
# The code under test is two functions: one that calibrates, and one that makes the sets of new
# images, bool `[B, K, H, W]`. The claim: at α = 0.1, from 10 labelled images, each pixel's set
# contains the true class with probability 90 %. `assert_coverage` calibrates on 10 fresh images,
# looks at another one, and does so 200 times.


# %%
def procedure(quantile):
    """Pixel-wise calibration with some quantile: `calibrate` and `predict`."""

    def calibrate(probs, labels, alpha):
        scores = 1 - probs.gather(1, labels[:, None])[:, 0]  # [n, H, W]
        each = [quantile(pixel, alpha) for pixel in scores.flatten(1).T]
        return torch.stack(each).reshape(scores.shape[1:])

    def predict(threshold, probs):
        return 1 - probs <= threshold

    return calibrate, predict


for quantile in (forgets_the_new_image, counts_the_new_image):
    print(quantile.__name__)
    outcome(assert_coverage, *procedure(quantile), draw, alpha=0.1, n=10, trials=200)

# %% [markdown]
# The message gives the coverage that was seen and its confidence bound. The false-alarm rate, one
# in a million, is the probability that a *correct* procedure fails this test. Seeds are fixed, so a
# test that has passed stays green until the code changes.
#
# With few images the mistake is large. With 99 images the wrong rank costs at most one point of
# coverage, and a test of coverage needs many trials to see it. `assert_leave_one_out` sees it
# always.
#
# ## A leak
#
# The next mistake leaves the quantile right: "labelled images" that were drawn *with* replacement.
# The image that is tested may then be one of those that calibrated. The test of such a draw is
# worthless, since even the wrong quantile may pass it:


# %%
def draw_with_replacement(generator, m):
    picks = torch.randint(6, (m,), generator=generator)  # of 6 images only
    return pool_probs[picks], pool_labels[picks]


for name, sampler in (("without", draw), ("with", draw_with_replacement)):
    calibrate, predict = procedure(forgets_the_new_image)
    covered = torch.zeros(0)
    for trial in range(200):
        probs, labels = sampler(torch.Generator().manual_seed(trial), 11)
        sets = predict(calibrate(probs[:10], labels[:10], 0.1), probs[10:])
        covered = torch.cat([covered, sets.gather(1, labels[10:, None]).float().flatten()])
    print(f"{name} replacement: coverage of the wrong quantile {covered.mean():.3f}")

# %% [markdown]
# Without replacement the coverage is about 80 %, which is what this quantile gives with 10 images.
# With replacement the same code looks about as good as it claims to be.
#
# ## Selection
#
# Pseudo-labels are selected from sets by eq. 4 of ConformalSAM: with a background class, a pixel is
# an object wherever an object is in its set. `assert_selection_law` compares your function with a
# literal loop, on inputs that are made to break it: ties, thresholds exactly at a score, infinite
# thresholds.


# %%
def select(probs, threshold, background):
    inside = 1 - probs.float() <= threshold
    labels = torch.where(inside, probs.float(), -1).argmax(0)
    return labels.masked_fill(~inside.any(0), 255)


print("no background:")
outcome(assert_selection_law, select, backgrounds=[None])
print("class 0 is the background:")
outcome(assert_selection_law, select, backgrounds=[0])

# %% [markdown]
# The function forgets to suppress the background. cpseg's own functions pass:

# %%
outcome(assert_leave_one_out, cpseg.conformal_quantile, exact=True)
outcome(assert_selection_law, lambda p, t, b: cpseg.pseudo_labels(p, t, background=b))

# %% [markdown]
# In a test-suite leave out `outcome` and call the assertions themselves. The page on [testing your
# own coverage](../testing.md) has the other options: units other than the pixel, exact coverage,
# and strategies for hypothesis.
