"""Find out, before anything expensive, whether a processor goes with a model.

A folder may have another family's processor, or files of another version of its own. transformers
shows that deep inside a call, and mostly by the shape of a tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deos_fx.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deos_fx.inputs.call import Call

__all__ = ["check_going_together"]

# How code fails that is given inputs of another form.
_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def check_going_together(processor: Any, model: PreTrainedModel, where: str) -> None:
    """Check that a model reads what a processor makes of a prompt with an image.

    Args:
        processor: The processor.
        model: The model, on the meta device.
        where: Where the processor is, for the message.

    Raises:
        ValueError: If the model does not; the message says what does not fit.
    """
    from deos_fx.inputs.call import Call
    from deos_fx.inputs.example import processed_example
    from deos_fx.models.facts import facts_of

    try:
        facts, inputs = facts_of(model), processed_example(processor)
    except ValueError:
        # Case: models that are not reduced, and templates that refuse this question. What is asked
        # of them says why.
        return
    call = Call.of(facts, inputs)
    reason = _other_tokens(call, processor) or _failure(call)
    if reason:
        raise ValueError(
            f"the processor in {where} does not go with the {facts.signature.model_type} model "
            f"there: {reason}. Save the model's own there (processor.save_pretrained)"
        )


def _other_tokens(call: Call, processor: Any) -> str:
    """Return how the tokens of a prompt are not the model's; empty if they are."""
    ids, token = call.inputs["input_ids"], call.facts.image_token
    # Case: a token stands for an image, which is negative in models where none does.
    if token >= 0 and not bool((ids == token).any()):
        own = str(getattr(processor, "image_token", None) or "<image>")
        number = processor.tokenizer.convert_tokens_to_ids(own)
        return f"an image is {own} there (token id {number}), and token id {token} in the model"
    embeddings: Any = call.model.get_input_embeddings()
    known = embeddings.weight.shape[0]
    highest = int(ids[ids != token].max())
    if highest >= known:
        return f"its prompts have the token id {highest}, and the model knows {known} tokens"
    return ""


def _failure(call: Call) -> str:
    """Return why the model cannot read the inputs; empty if it can."""
    from deos_fx.inputs.complete import completed
    from deos_fx.models.shapes_only import count_visual_tokens
    from deos_fx.policy.policy import Policy
    from deos_fx.runtime.reduced_model import ReducedModel

    facts = call.facts
    tokens = count_visual_tokens(call.model, call.images)
    try:
        completed(call).check_images()
        if not tokens:
            # Case: the encoder has not run, perhaps because it wants more than the images.
            ReducedModel(call.model, Policy()).capture(**call.inputs)
        return ""
    except _FAILURES as error:
        # The most telling of what differs. Not every processor makes all that a model may be given.
        unknown = call.inputs.keys() - facts.arguments.parameters.keys()
        if unknown:
            return f"it makes {', '.join(sorted(unknown))}, which the model does not take"
        missing = facts.size_inputs - call.inputs.keys()
        if missing:
            return f"it does not make {', '.join(sorted(missing))}, which the model takes"
        written = int((call.inputs["input_ids"] == facts.image_token).sum())
        if tokens and tokens != written:
            placeholders = counted(written, "placeholder")
            return f"it writes {placeholders} of an image, of which the model makes {tokens} tokens"
        lines = str(error).splitlines() or [""]
        return f"the model fails on its inputs ({type(error).__name__}: {lines[0]})"
