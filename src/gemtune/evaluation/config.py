"""The keys of `eval`, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass

from gemtune.errors import ConfigError
from gemtune.options import did_you_mean, option, require_choice, require_range

OF_TOKENS = ("eval/loss", "eval/perplexity", "eval/token_accuracy")
"""What every evaluation measures, without generating."""
OF_ANSWERS = {
    "exact_match": ("eval/exact_match",),
    "chrf": ("eval/chrf",),
    "rouge": ("eval/rouge1", "eval/rouge2", "eval/rougeL"),
}
"""Entry of `eval.metrics` -> what it measures. exact_match adds `eval/exact_match_KIND`."""


@dataclass
class EvalConfig:
    """What is measured on held-out rows, and what follows from it."""

    metrics: list[str] = option(
        ["exact_match"],
        "of generated answers: exact_match, chrf, rouge, or package.module.function (it is run)",
    )
    generate_every_steps: int | None = option(
        None, "steps between evaluations that generate answers too; null: at the end only"
    )
    samples: int = option(8, "generated answers that a dashboard gets each time; 0: none")
    best_metric: str = option("eval/loss", "decides which checkpoint is the best, and stays")
    export_best: bool = option(
        False, "export the best checkpoint, where the last state of the model is not better"
    )
    best_mode: str = option("auto", "min or max is better; auto: known for metrics of our own")
    early_stopping_patience: int | None = option(
        None, "evaluations without a better best_metric before the run ends; null: never"
    )
    early_stopping_min_delta: float = option(0.0, "what is better by no more counts as no better")

    def __post_init__(self) -> None:
        require_range("eval.generate_every_steps", self.generate_every_steps, at_least=1)
        require_range("eval.samples", self.samples, at_least=0)
        require_choice("eval.best_mode", self.best_mode, ["auto", "min", "max"])
        require_range("eval.early_stopping_patience", self.early_stopping_patience, at_least=1)
        require_range("eval.early_stopping_min_delta", self.early_stopping_min_delta, at_least=0)
        self._check_metrics()
        self._check_best()

    def _check_metrics(self) -> None:
        names = [name_of(metric) for metric in self.metrics]
        for metric, name in zip(self.metrics, names, strict=True):
            if "." not in metric and metric not in OF_ANSWERS:
                raise ConfigError(
                    f"eval.metrics: {metric!r} is not one of {', '.join(OF_ANSWERS)}, nor the "
                    "dotted path of a function, such as my_package.metrics.score."
                    f"{did_you_mean(metric, OF_ANSWERS)}"
                )
            taken = {"loss", "perplexity", "token_accuracy", "samples", "rouge1", "rouge2"}
            taken |= {*OF_ANSWERS, "rougeL"} if "." in metric else set()
            if names.count(name) > 1 or name in taken:
                raise ConfigError(
                    f"eval.metrics: {metric} would be logged as eval/{name}, which is taken. Give "
                    "each metric once, and a function a name of its own."
                )

    def _check_best(self) -> None:
        if not self.is_measured(self.best_metric):
            known = [*OF_TOKENS, *(key for m in self.metrics for key in _keys_of(m))]
            raise ConfigError(
                f"eval.best_metric={self.best_metric} is not measured. It can be "
                f"{', '.join(known)}; eval.metrics={self.metrics} decides what is measured of "
                f"answers.{did_you_mean(self.best_metric, known)}"
            )
        if self.best_mode == "auto" and _known_mode(self.best_metric) is None:
            raise ConfigError(
                f"eval.best_metric={self.best_metric} is yours: say whether less or more of it is "
                "better with eval.best_mode=min or eval.best_mode=max."
            )

    def is_measured(self, key: str) -> bool:
        """Whether a metric of that name can be in an evaluation."""
        return key in OF_TOKENS or self.is_of_answers(key)

    def is_of_answers(self, key: str) -> bool:
        """Whether it takes generated answers."""
        for metric in self.metrics:
            own = OF_ANSWERS.get(metric, (f"eval/{name_of(metric)}",))
            has_more = metric == "exact_match" or metric not in OF_ANSWERS
            if key in own or (has_more and key.startswith(f"{own[0]}_")):
                return True
        return False

    @property
    def mode(self) -> str:
        """min or max: what is better of `best_metric`."""
        known = _known_mode(self.best_metric)
        return self.best_mode if self.best_mode != "auto" or known is None else known

    def generates_at(self, step: int) -> bool:
        """Whether the evaluation after that step generates answers."""
        return self.generate_every_steps is not None and not step % self.generate_every_steps

    def check_cadence(
        self, eval_every_steps: int | None, num_generated_rows: int | None, counts_tokens: bool
    ) -> None:
        """Refuse what the keys of the loop, the data and the patches do not allow.

        Args:
            counts_tokens: whether the loss comes with `eval/token_accuracy`.

        Raises:
            ConfigError: with both keys.
        """
        every = self.generate_every_steps
        if every is not None and (eval_every_steps is None or every % eval_every_steps):
            raise ConfigError(
                f"eval.generate_every_steps={every} must be a multiple of loop.eval_every_steps="
                f"{eval_every_steps}: answers are generated in an evaluation."
            )
        if every is not None and num_generated_rows == 0:
            raise ConfigError(
                f"eval.generate_every_steps={every} has no rows to answer: "
                "data.eval_generate_rows=0. Raise it, or leave the other out."
            )
        patience = self.early_stopping_patience
        if patience is not None and eval_every_steps is None:
            raise ConfigError(
                f"eval.early_stopping_patience={patience} counts evaluations between steps, and "
                "there are none: set loop.eval_every_steps."
            )
        if self.export_best and eval_every_steps is None:
            raise ConfigError(
                "eval.export_best=true chooses among evaluations between steps, and there are "
                "none: set loop.eval_every_steps."
            )
        best = self.best_metric
        if self.is_of_answers(best) and every is None:
            raise ConfigError(
                f"eval.best_metric={best} is of generated answers: set eval.generate_every_steps."
            )
        if best == "eval/token_accuracy" and not counts_tokens:
            raise ConfigError(
                "eval.best_metric=eval/token_accuracy comes with the patch linear_cross_entropy or "
                "supervised_positions. Put one of them in patches, or take eval/loss."
            )


def name_of(metric: str) -> str:
    """What an entry of `eval.metrics` is logged as: of a dotted path the last word."""
    return metric.rpartition(".")[2]


def _keys_of(metric: str) -> tuple[str, ...]:
    return OF_ANSWERS.get(metric, (f"eval/{name_of(metric)}",))


def _known_mode(key: str) -> str | None:
    if key in ("eval/loss", "eval/perplexity"):
        return "min"
    ours = {"eval/token_accuracy", *(key for keys in OF_ANSWERS.values() for key in keys)}
    return "max" if key in ours or key.startswith("eval/exact_match_") else None
