"""A compiler for the visual tokens of Hugging Face vision-language models.

`transform` reduces the visual tokens of a model, `search` finds where to reduce, how many tokens to
keep and how to treat the rest, `compare` measures the result against tuned presets, and
`export_onnx` writes it for ONNX Runtime. Public names are imported at their first use.
"""

import typing as _typing

from deos_fx.deferred import deferred as _deferred
from deos_fx.version import __version__ as __version__

if _typing.TYPE_CHECKING:
    from deos_fx import presets as presets
    from deos_fx.api import transform as transform
    from deos_fx.comparison.compare import compare as compare
    from deos_fx.exporters.genai import export_genai as export_genai
    from deos_fx.exporters.onnx import export_onnx as export_onnx
    from deos_fx.exporters.onnx_model import OnnxModel as OnnxModel
    from deos_fx.exporters.profile import profile as profile
    from deos_fx.passes.search.search import search as search
    from deos_fx.policy.budget import Budget as Budget
    from deos_fx.policy.latency import LatencyTable as LatencyTable
    from deos_fx.policy.policy import Policy as Policy
    from deos_fx.policy.reduction import Reduction as Reduction
    from deos_fx.results.comparison import Comparison as Comparison
    from deos_fx.results.search_front import SearchFront as SearchFront
    from deos_fx.results.search_result import SearchResult as SearchResult
    from deos_fx.runtime.reduced_model import ReducedModel as ReducedModel

__all__ = [
    "Budget",
    "Comparison",
    "LatencyTable",
    "OnnxModel",
    "Policy",
    "ReducedModel",
    "Reduction",
    "SearchFront",
    "SearchResult",
    "__version__",
    "compare",
    "export_genai",
    "export_onnx",
    "presets",
    "profile",
    "search",
    "transform",
]

# So `import deos_fx` is fast, and the command line shows its help at once.
__getattr__ = _deferred(
    __name__,
    {
        "Budget": "policy.budget",
        "Comparison": "results.comparison",
        "LatencyTable": "policy.latency",
        "OnnxModel": "exporters.onnx_model",
        "Policy": "policy.policy",
        "ReducedModel": "runtime.reduced_model",
        "Reduction": "policy.reduction",
        "SearchFront": "results.search_front",
        "SearchResult": "results.search_result",
        "compare": "comparison.compare",
        "export_genai": "exporters.genai",
        "export_onnx": "exporters.onnx",
        "presets": "presets",
        "profile": "exporters.profile",
        "search": "passes.search.search",
        "transform": "api",
    },
)


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})
