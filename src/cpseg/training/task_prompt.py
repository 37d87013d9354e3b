"""The task prompt of SUM: tells the model which kind of mask a training example has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpseg._internal.checks import (
    check_count,
    check_float,
    check_integer,
    check_not_empty,
    check_same_device,
    is_compiling,
    message,
    shape,
)


class TaskPrompt(nn.Module):
    """A learned vector per task, which is added at every position of an image embedding.

    In SUM, task 0 means unlabelled examples, 1 salient objects and 2 entities; each task has a
    vector, also task 0. The vectors start at zero (the paper does not give their initial values),
    so at first the model works as before for every task. The paper adds the vector only in the
    first round of interaction; the caller is responsible for this and skips the module in later
    rounds.

    Args:
        num_tasks: number of tasks.
        dim: channels of the image embedding (SAM: 256).

    Raises:
        ValueError: an argument is not a positive whole number.

    Reference:
        SUM (NeurIPS 2024), section 3.2.4 and appendix B.2.

    Example:
        >>> task_prompt = TaskPrompt(3, 8)
        >>> task_prompt(torch.rand(2, 8, 4, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, num_tasks: int, dim: int) -> None:
        super().__init__()
        for name, value in (("num_tasks", num_tasks), ("dim", dim)):
            fix = "SUM uses 3 tasks, SAM 256 channels"
            check_count("TaskPrompt", value, name=name, fix=fix, most=2**20)
        self.embedding = nn.Embedding(num_tasks, dim)
        nn.init.zeros_(self.embedding.weight)

    def forward(self, image_embedding: Tensor, tasks: Tensor) -> Tensor:
        """Add the task vector of each example to its image embedding.

        Args:
            image_embedding: float ``[B, dim, h, w]``.
            tasks: the task of each example, integer ``[B]``, 0..num_tasks-1.

        Returns:
            float ``[B, dim, h, w]``, the dtype of ``image_embedding``.

        Raises:
            ValueError: shapes or devices do not match, or a task lies outside 0..num_tasks-1 (on
                a CPU; on an accelerator the lookup itself fails).
            TypeError: wrong dtypes.
        """
        where = "TaskPrompt"
        check_float(where, image_embedding, name="image_embedding")
        check_integer(where, tasks, name="tasks")
        count, dim = self.embedding.weight.shape
        if image_embedding.ndim != 4 or image_embedding.shape[1] != dim:
            expected, got = f"image_embedding [B, {dim}, h, w]", shape(image_embedding)
            raise ValueError(
                message(where, expected, got, "build the module with the model's channels")
            )
        if tasks.shape != image_embedding.shape[:1]:
            expected = f"tasks [{len(image_embedding)}]"
            raise ValueError(message(where, expected, shape(tasks), "pass one task per example"))
        check_not_empty(where, image_embedding, name="image_embedding")
        check_same_device(where, tasks, image_embedding, name="tasks", reference="image_embedding")
        if tasks.device.type == "cpu" and not is_compiling():
            wrong = tasks[(tasks < 0) | (tasks >= count)]
            if len(wrong) > 0:
                expected, fix = f"tasks in 0..{count - 1}", "build the module with more tasks"
                raise ValueError(message(where, expected, str(int(wrong[0])), fix))
        vector: Tensor = self.embedding(tasks.to(torch.int64))
        return image_embedding + vector.to(image_embedding.dtype)[:, :, None, None]
