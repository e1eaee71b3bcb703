"""Exports whose counts are inputs: one folder for many budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deos_fx.passes.rewrite.free_counts import KEEP, check_free
from deos_fx.policy.counts import with_counts
from deos_fx.policy.policy import Policy
from deos_fx.policy.site import split_site
from deos_fx.words import counted

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["check_elastic", "counts_of_rows", "take_counts", "traced_counts", "trials"]


def check_elastic(policy: Policy, sizes: Sequence[int]) -> None:
    """Refuse policies and prompts whose counts cannot be inputs.

    Args:
        policy: The policy.
        sizes: Visual tokens of each image of a prompt.

    Raises:
        ValueError: If there is nothing to choose, or more than how many tokens are picked depends
            on a count.
    """
    if policy.is_empty:
        raise ValueError("elastic=True, but the policy reduces nothing. Leave elastic out.")
    if len({*sizes}) > 1:
        raise ValueError(
            f"elastic=True, but the images of a prompt have {', '.join(map(str, sizes))} visual "
            "tokens: a reduction has one count for images of one size. Leave elastic out."
        )
    check_free(policy.reductions)
    counts_of_rows(policy, sizes)


def counts_of_rows(policy: Policy, sizes: Sequence[int]) -> list[int]:
    """Return how many tokens each reduction picks in a row of what it sees.

    Args:
        policy: The policy.
        sizes: Visual tokens of each image of a prompt; all are equal.

    Returns:
        Counts in order of depth: of an image before the decoder, of all images of a prompt in it.

    Raises:
        ValueError: If a reduction drops nothing of what is left by the one before it.
    """
    counts, before = [], sizes[0]
    for reduction, count in zip(policy.reductions, policy.counts(sizes[0]), strict=True):
        if count == before:
            # ONNX Runtime (1.31) cannot sum over no tokens at all, as merging then would.
            raise ValueError(
                f"{reduction.site} keeps all of {counted(count, 'token')} of an image; in an "
                "elastic export every reduction has to drop at least one"
            )
        in_decoder = split_site(reduction.site)[0] == "decoder"
        counts.append(count * (len(sizes) if in_decoder else 1))
        before = count
    return counts


def trials(policy: Policy, sizes: Sequence[int]) -> list[Policy]:
    """Return the policy with the counts that an export is checked with: own, fewest, and most."""
    places = range(len(policy.reductions))
    fewest, most = ([top - 1 - i for i in places] for top in (len(places) + 1, sizes[0]))
    return [policy, with_counts(policy, fewest), with_counts(policy, most)]


def traced_counts(policy: Policy, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return the counts that a graph is traced with, and the largest that it may be told of.

    While it traces, torch.export takes every axis for 2 or longer, also that of dropped tokens. An
    exported graph has no such limit.
    """
    places, most = len(policy.reductions), trials(policy, sizes)[-1]
    apart = [sizes[0] * (places - i) // (places + 1) for i in range(places)]
    rows = (counts_of_rows(one, sizes) for one in (with_counts(policy, apart), most))
    return [(count, limit - 1) for count, limit in zip(*rows, strict=True)]


def take_counts(program: onnx_ir.Model) -> None:
    """Let a prefill graph take numbers in place of tensors whose lengths are the counts.

    Args:
        program: The graph. Changed in place: its inputs ``keep_k`` [K] become int64 [1].
    """
    import onnx_ir

    graph = program.graph
    for place, given in enumerate(graph.inputs):
        if not str(given.name).startswith(KEEP):
            continue
        count = onnx_ir.Value(
            name=given.name,
            type=onnx_ir.TensorType(onnx_ir.DataType.INT64),
            shape=onnx_ir.Shape([1]),
        )
        zeros = onnx_ir.node("ConstantOfShape", [count])
        zeros.outputs[0].name = f"of_{given.name}"
        given.replace_all_uses_with(zeros.outputs[0])
        graph.inputs[place] = count
        graph.insert_before(graph[0], zeros)
