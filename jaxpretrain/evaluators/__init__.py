"""How good is the representation? One class per protocol, made once per run, called with any state.

`build(dict(type='KNN', k=20), context=context).run(state)` gives `{'top1': ..., 'top5': ...}`. The trainer names the
scores after the evaluator's key in `config.evaluators`: `knn/top1`.
"""

from jaxpretrain.evaluators.base import EvalContext, Evaluator, extract, run_all

__all__ = ["EvalContext", "Evaluator", "extract", "run_all"]
