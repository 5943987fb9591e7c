"""The types of a method, a row of the table, and of a chosen method."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal, cast

from array_api_compat import array_namespace

from ..errors import UserError
from .divergences import Divergence
from .rules import ONE, Array, Rule, Signals

Form = Literal["live", "frozen-target", "frozen-weight"]
# π̃; "gem" is the one method whose gradient is not made of a trust and a residual
Residual = Literal[
    "observed", "student", "base", "teacher", "uniform", "mixture", "contrast", "gem"
]
# what a target folder stores for it; "base-observed" is only the base's probability of y
Stored = Literal["observed", "base-observed", "base", "teacher", "uniform", "mixture", "contrast"]

FROZEN: tuple[Form, ...] = ("frozen-target", "frozen-weight")
# of the whole distribution: the logits of a support and the sum of all others do not give them
OF_WHOLE = frozenset({"concentration", "rank", "expected_rank"})
_OF_STUDENT = OF_WHOLE | {"log_prob", "entropy", "top_entropy", "sequence_log_ratio"}
_OF_TEACHER = frozenset({"teacher_log_prob", "divergence"})
_NO_WEIGHT: Mapping[Form, str] = {
    "frozen-weight": "a weight alone would drop its residual, and with it what it is for"
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method: a number in a range, or one of `words`.

    `default` None takes the value from the data (see `Statistic`).
    """

    name: str
    default: float | str | None
    low: float = 0.0
    high: float = 1e6
    above: bool = False  # excludes `low` itself
    words: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """The range, in words."""
        if self.words:
            return f"one of {', '.join(self.words)}"
        return f"{'above ' if self.above else ''}{self.low:g}{',' * self.above} to {self.high:g}"

    def parse(self, method: str, value: Any) -> float | str:
        """Convert and check a value. Raises UserError if it is not allowed."""
        if self.words:
            if value not in self.words:
                raise UserError(f"{method}: {self.name}={value} is not known: give {self.allowed}")
            return str(value)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"{method}: {self.name}={value} is not a number: give {self.allowed}"
            ) from None
        inside = self.low < number if self.above else self.low <= number
        if not (inside and number <= self.high):  # also refuses NaN
            raise UserError(
                f"{method}: {self.name}={number:g} is out of range: give {self.allowed}"
            )
        return number


@dataclass(frozen=True, slots=True)
class Statistic:
    """A parameter that is computed from the data set if it is not given.

    It is the mean of some order statistics of `values` over all positions. `places` gives their
    places in ascending order, from 0, for a number of positions; without any it is `otherwise`.
    """

    parameter: str
    values: Rule
    places: Callable[[int, Mapping[str, Any]], tuple[int, ...]]
    otherwise: float = 0.0


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table; the defaults are those of SFT.

    `refused` gives the reason why a form is missing. build-targets takes the first of `forms`.
    With a `divergence` the loss is that of the student from π̃, which is not a cross-entropy.
    """

    name: str
    trust: Rule = ONE
    residual: Residual = "observed"
    scale: Rule = ONE
    _: KW_ONLY
    source: str
    parameters: tuple[Parameter, ...] = ()
    forms: tuple[Form, ...] = ("frozen-target", "live")
    refused: Mapping[Form, str] = field(default_factory=lambda: _NO_WEIGHT)
    statistic: Statistic | None = None
    divergence: Divergence | None = None

    @property
    def reads(self) -> frozenset[str]:
        """The signals that its rules read."""
        return self.trust.reads | self.scale.reads


@dataclass(frozen=True, slots=True)
class Choice:
    """A method with its form and parameters."""

    method: Method
    form: Form
    parameters: dict[str, Any]

    @property
    def reads_student(self) -> bool:
        """Whether the target depends on the student in training."""
        method = self.method
        reads = method.reads & _OF_STUDENT or method.residual in ("mixture", "gem")
        return self.form == "live" and bool(reads or method.divergence)

    @property
    def is_weight(self) -> bool:
        """Whether the loss is a weighted NLL: the weight is s·γ, and Q is one-hot."""
        live = self.form == "live" and self.method.residual == "student"
        return self.form == "frozen-weight" or live

    @property
    def residual(self) -> Residual:
        """π̃ in this form; frozen forms replace the student."""
        if self.form == "frozen-weight":
            return "observed"
        is_base = self.form == "frozen-target" and self.method.residual == "student"
        return "base" if is_base else self.method.residual

    @property
    def stored(self) -> Stored:
        """The distribution that a target folder must hold."""
        if self.reads_student and self.residual in ("observed", "student", "gem"):
            needs_base = self.method.reads & {"base_log_prob", "sequence_log_ratio"}
            return "base-observed" if needs_base else "observed"
        if self.residual == "student":
            return "observed"
        is_live_mixture = self.form == "live" and self.residual == "mixture"
        return "teacher" if is_live_mixture else cast(Stored, self.residual)

    @property
    def mixing(self) -> tuple[float, float]:
        """η and α of a mixture of the followed model and the teacher."""
        return self.parameters["eta"], self.parameters.get("alpha", 1.0)

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher's scores are needed to build the targets."""
        of_teacher = bool((self.method.reads | self.statistic_reads) & _OF_TEACHER)
        return of_teacher or self.stored in ("teacher", "mixture", "contrast")

    @property
    def needs_mask(self) -> bool:
        """Whether the demonstrations must supply a mask."""
        return "mask" in self.method.reads

    @property
    def unresolved(self) -> Statistic | None:
        """The statistic that is still to be computed from the data set."""
        statistic = self.method.statistic
        return statistic if statistic and statistic.parameter not in self.parameters else None

    @property
    def statistic_reads(self) -> frozenset[str]:
        """The signals that the statistic reads."""
        return self.method.statistic.values.reads if self.method.statistic else frozenset()

    def resolved(self, value: float) -> "Choice":
        """The choice with the value of its statistic. Raises UserError if that is out of range."""
        assert self.method.statistic is not None
        name = self.method.statistic.parameter
        (parameter,) = (each for each in self.method.parameters if each.name == name)
        try:
            checked = parameter.parse(self.method.name, value)
        except UserError as error:
            raise UserError(f"{error} (the data give this value: set --param {name}=…)") from error
        return replace(self, parameters=self.parameters | {name: checked})

    def trust_and_scale(self, signals: Signals) -> tuple[Array, Array]:
        """γ and s at each position, [...] each."""
        method, parameters = self.method, self.parameters
        return method.trust(signals, parameters), method.scale(signals, parameters)

    def trust_and_weight(self, signals: Signals) -> tuple[Array, Array]:
        """The trust and the weight of the loss, [...] each: 1 and s·γ for a weight."""
        trust, scale = self.trust_and_scale(signals)
        if self.is_weight:
            return array_namespace(trust).ones_like(trust), scale * trust
        return trust, scale
