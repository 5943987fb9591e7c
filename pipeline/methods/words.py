"""The table of methods in words, for `qpipe methods` and the README."""

from collections.abc import Mapping

from .definition import Choice, Method, Parameter, Residual, Stored
from .table import METHODS, choose


def table() -> list[dict[str, str]]:
    """The rows of the table, each a dict from column to text."""
    return [
        {
            "name": method.name,
            "trust": method.trust.formula,
            "residual": _residual_words(method),
            "scale": method.scale.formula,
            "parameters": ", ".join(map(_parameter_words, method.parameters)) or "-",
            "forms": ", ".join(method.forms),
            "needs": needs(method),
            "source": method.source,
        }
        for method in METHODS.values()
    ]


def needs(method: Method) -> str:
    """What targets hold besides the tokens, by form if the forms differ."""
    by_form = {form: _needs(choose(method.name, form)) for form in method.forms}
    if len(set(by_form.values())) == 1:
        return next(iter(by_form.values()))
    return "; ".join(f"{form}: {words}" for form, words in by_form.items())


def _needs(choice: Choice) -> str:
    words: list[str] = []
    if choice.stored in _STORED_WORDS:
        is_power = choice.stored == "mixture" and "alpha" in choice.parameters
        words.append("the mixture of b and q" if is_power else _STORED_WORDS[choice.stored])
    if not choice.reads_student and choice.is_weight and choice.method.reads:
        words.append("a weight")
    if choice.needs_mask:
        words.append("a mask with the demonstrations")
    if choice.needs_teacher:
        words.append("--teacher")
    return " + ".join(words) or "-"


def _residual_words(method: Method) -> str:
    if method.residual == "mixture" and "alpha" in (each.name for each in method.parameters):
        return "~ ((1-eta) p^a + eta q^a)^(1/a), a = (1-alpha)/2"
    return _RESIDUAL_WORDS[method.residual]


_RESIDUAL_WORDS: Mapping[Residual, str] = {
    "observed": "-",
    "student": "p",
    "base": "b",
    "teacher": "q",
    "uniform": "1/V",
    "mixture": "~ p^(1-eta) q^eta",
    "contrast": "~ q/b where q >= alpha max q",
    "gem": "-",
}
_STORED_WORDS: Mapping[Stored, str] = {
    "base-observed": "b_y",
    "base": "b",
    "teacher": "q",
    "mixture": "b^(1-eta) q^eta",
    "contrast": "q/b",
}


def _parameter_words(parameter: Parameter) -> str:
    default = parameter.default
    if default is None:
        default = "of the data"
    elif not parameter.words:
        default = f"{default:g}"
    return f"{parameter.name}={default} ({parameter.allowed})"
