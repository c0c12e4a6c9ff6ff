"""The keys under `method.`, declared beside the code that reads them, and which of them a method reads. No torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_serializer

from preftune.errors import Refusal, nearest
from preftune.functions import load_function
from preftune.methods.table import NEEDS, Needs, check_name
from preftune.records import Pairs

log = logging.getLogger("preftune")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _names(mix: dict[str, float]) -> dict[str, float]:
    return {check_name(name): weight for name, weight in mix.items()}


# of a built-in penalty: the threshold that it has without one
THRESHOLDS = {"drift": 0.0, "log_ratio": 0.0, "phrases": -20.0}


class ConstraintOptions(BaseModel):
    """One constraint, under the name that it is logged by."""

    model_config = ConfigDict(extra="forbid", strict=True)

    penalty: str | None = Field(
        default=None,
        description="drift (|log-ratio| per token), log_ratio (|log-ratio|), phrases (their log-probability), or "
        "package.module:function of the scores, differentiable; absent: the constraint's own name, if it is one of these.",
    )
    cost: str | None = Field(
        default=None, description="package.module:function of prompts and responses: a cost of what the policy writes."
    )
    weight: Positive = Field(default=1.0, description="Beside the method's own loss.")
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        default=None, description="Up to which nothing is asked; 0, of phrases -20 nats."
    )
    phrases: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = Field(
        default=None, description="phrases: what no answer should begin with."
    )
    samples: Annotated[int, Field(ge=2)] = Field(default=4, description="cost: answers sampled to each prompt, once.")
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(default=64, description="cost: longest of these.")

    @property
    def limit(self) -> float:
        return THRESHOLDS.get(self.penalty or "", 0.0) if self.threshold is None else self.threshold

    @property
    def needs_reference(self) -> bool:
        return self.penalty in ("drift", "log_ratio")


def _named(constraints: dict[str, ConstraintOptions]) -> dict[str, ConstraintOptions]:
    """A constraint that is called like a built-in penalty is that penalty."""
    return {
        name: c.model_copy(update={"penalty": name}) if c.penalty is None and c.cost is None and name in THRESHOLDS else c
        for name, c in constraints.items()
    }


class MethodOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, AfterValidator(check_name)] | None = Field(
        default=None, description="One of the methods below; absent: by the kind of marks in the data, said aloud."
    )
    mix: Annotated[dict[str, Positive], Field(min_length=1), AfterValidator(_names)] | None = Field(
        default=None, description="Instead of a name: several methods of comparisons and their weights, {dpo: 0.8, sft: 0.2}."
    )
    constraints: Annotated[dict[str, ConstraintOptions], AfterValidator(_named)] | None = Field(
        default=None,
        description="Penalties beside the loss, by name: {drift: {weight: 0.1, threshold: 0.2}, polite: {cost: my.module:f}}.",
    )
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] | None = Field(
        default=None,
        description="Distance that holds policy to reference, where the loss reads log-ratios alone: reverse_kl (as usual), "
        "forward_kl, js or alpha.",
    )
    divergence_alpha: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Of method.divergence=alpha: from reverse_kl near 0 to forward_kl at 1; 0.5."
    )
    weighting: Literal["wpo"] | None = Field(
        default=None, description="wpo: pairs count as much as the policy is likely to write them."
    )
    pairs: Pairs | None = Field(
        default=None, description="What a ranking gives to methods of pairs: all, or best_vs_rest; default all."
    )
    noise: Annotated[float, Field(ge=0, lt=0.5)] | None = Field(
        default=None, description="cdpo, robust: share of labels that are the wrong way round; 0.1."
    )
    gamma: NotNegative | None = Field(default=None, description="simpo: the lead that is asked for; 1.")
    alpha: NotNegative | None = Field(
        default=None,
        description="rpo, cpo: weight of the likelihood, 1. r_dpo: price of a token, 0.01. ld_dpo: what tokens past the "
        "shorter answer's length count, 0 to 1, 0.5.",
    )
    penalty: NotNegative | None = Field(default=None, description="dpop: of a chosen answer below the reference; 50.")
    temperature: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="discopop: how sharply its two parts take turns; 0.05."
    )
    epsilon: Annotated[float, Field(gt=0, lt=0.5)] | None = Field(
        default=None, description="exo: keeps its target off 0 and 1; 0.001."
    )
    scale: NotNegative | None = Field(default=None, description="mm_dpo: how far beta grows with the margin; 0.5.")
    rate: Positive | None = Field(default=None, description="mm_dpo: how fast; 0.5.")
    centering: NotNegative | None = Field(default=None, description="reward: draws the mean of the rewards to 0; 0.")
    margin_scale: NotNegative | None = Field(
        default=None, description="reward: the lead that is asked for, in rewards per unit of a judgement's strength; 0."
    )
    listwise: bool | None = Field(
        default=None, description="reward: a ranking's whole order at once (Plackett-Luce), not its pairs; false."
    )
    desirable_weight: NotNegative | None = Field(default=None, description="Methods of ratings: of the desirable ones; 1.")
    undesirable_weight: NotNegative | None = Field(default=None, description="Methods of ratings: of the others; 1.")

    @property
    def members(self) -> dict[str, float]:
        """The methods that are asked for, and their weights."""
        return self.mix or ({self.name: 1.0} if self.name else {})

    @property
    def label(self) -> str:
        """What a run calls it."""
        return "+".join(self.members)

    @property
    def settings(self) -> dict[str, Any]:
        """The keys that were given, besides those that name methods."""
        given = {name: getattr(self, name) for name in type(self).model_fields if name not in ("name", "mix", "constraints")}
        return {name: value for name, value in given.items() if value is not None}

    @model_serializer
    def _what_is_read(self) -> dict[str, Any]:
        """A written run holds the name, and of the rest what was given."""
        constraints = {name: c.model_dump(exclude_none=True) for name, c in (self.constraints or {}).items()}
        own = {"mix": self.mix, "constraints": constraints}
        return {"name": self.name, **{key: value for key, value in own.items() if value}, **self.settings}


Asked = str | Mapping[str, Any] | MethodOptions | None


def keys_of(method: Asked) -> dict[str, Any]:
    """The keys of a run's `method`, unchecked."""
    if isinstance(method, MethodOptions):
        return method.model_dump()
    if isinstance(method, Mapping):
        return dict(method)
    return {"name": method}


def options_of(method: Asked) -> MethodOptions:
    """A method by its name, or by the keys of a run's `method`.

    Raises:
        Refusal: an unknown name, or a key that is not known or not read.
    """
    if not isinstance(method, MethodOptions):
        try:
            method = MethodOptions.model_validate(keys_of(method))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(("method", *map(str, first["loc"])))
            if first["type"] == "extra_forbidden":
                known = (MethodOptions if len(first["loc"]) == 1 else ConstraintOptions).model_fields
                line = f"unknown key.{nearest(str(first['loc'][-1]), known)}"
                raise Refusal(line, code="unknown_key", key=key) from None
            raise Refusal(f"{first['msg']}, not {first['input']!r}", code="bad_value", key=key) from None
    check(method)
    return method


def check(method: MethodOptions) -> None:
    """Refuses keys that the method does not read, and mixes of what cannot be mixed. Without a name, nothing: it is the data's
    to say."""
    if method.mix:
        _check_mix(method, method.mix)
    for name, constraint in (method.constraints or {}).items():
        _check_constraint(f"method.constraints.{name}", constraint)
    if not method.members:
        return
    if method.constraints and any(NEEDS[name].scalar for name in method.members):
        line = "a constraint is of log-probabilities, and a reward model has none"
        raise Refusal(line, code="unused_key", key="method.constraints")
    reads = readable(method)
    for name in method.settings:
        if name not in reads:
            known = ", ".join(f"method.{key}" for key in reads) or "none of these keys"
            raise Refusal(f"{method.label} does not read it; it reads {known}", code="unused_key", key=f"method.{name}")
    if method.name == "ld_dpo" and method.alpha is not None and method.alpha > 1:
        raise Refusal(f"should be at most 1 for ld_dpo, not {method.alpha:g}", code="bad_value", key="method.alpha")
    if method.divergence_alpha is not None and method.divergence != "alpha":
        raise Refusal("method.divergence=alpha alone reads it", code="unused_key", key="method.divergence_alpha")


def _check_constraint(key: str, constraint: ConstraintOptions) -> None:
    """One that is a penalty or a cost, whose function can be imported, and that reads all that it is given."""
    if (constraint.penalty is None) == (constraint.cost is None):
        line = f"it needs either a penalty ({', '.join(THRESHOLDS)}, or package.module:function) or a cost"
        raise Refusal(line, code="bad_constraint", key=key)
    if constraint.penalty and constraint.penalty not in THRESHOLDS and ":" not in constraint.penalty:
        line = f"{constraint.penalty!r} is none of {', '.join(THRESHOLDS)}, and no package.module:function"
        raise Refusal(line, code="bad_constraint", key=f"{key}.penalty")
    if (constraint.penalty == "phrases") != (constraint.phrases is not None):
        line = "name the phrases: phrases=[...]" if constraint.phrases is None else "penalty=phrases alone reads it"
        raise Refusal(line, code="bad_constraint", key=f"{key}.phrases")
    for name in ("samples", "max_new_tokens"):
        if name in constraint.model_fields_set and constraint.cost is None:
            raise Refusal("a cost alone reads it", code="unused_key", key=f"{key}.{name}")
    for name in ("penalty", "cost"):
        if ":" in (function := getattr(constraint, name) or ""):
            load_function(function, f"{key}.{name}")


def _check_mix(method: MethodOptions, mix: Mapping[str, float]) -> None:
    if method.name:
        line = "method.mix names its methods itself: leave one of the two away, method.name=null or method.mix=null"
        raise Refusal(line, code="unused_key", key="method.name")
    kinds = {name: NEEDS[name].kind for name in mix}
    wrong = [name for name, kind in kinds.items() if kind not in ("pairs", "answers") or NEEDS[name].scalar]
    if wrong or "pairs" not in kinds.values():
        what = f"{wrong[0]} takes other examples" if wrong else "sft alone is method=sft"
        line = f"{what}: a mix is of methods that take pairs of answers, and of sft on the chosen ones"
        raise Refusal(line, code="bad_mix", key="method.mix")
    for key in method.settings:
        readers = {name: NEEDS[name].reads[key] for name in mix if key in NEEDS[name].reads}
        if len(set(readers.values())) > 1:
            line = f"it means something else to {' and to '.join(readers)}: leave it to their own defaults, or do not mix them"
            raise Refusal(line, code="bad_mix", key=f"method.{key}")


def readable(method: MethodOptions) -> list[str]:
    """The keys under `method.` that the method reads, or one of the methods of a mix."""
    rows = [NEEDS[name] for name in method.members]
    found = list(dict.fromkeys(key for row in rows for key in row.reads))
    if all(row.diverges for row in rows if row.reference) and any(row.diverges for row in rows):
        found += ["divergence", "divergence_alpha"]
    if any(row.kind == "pairs" and not row.scalar for row in rows):
        found += ["weighting"]
    if any(row.kind in ("pairs", "cut_pairs") for row in rows):
        found += ["pairs"]
    return found


def check_head(method: MethodOptions, *, scalar: bool) -> None:
    """Refuses a method of language models for a reward model (`scalar`), and the reverse."""
    if NEEDS[next(iter(method.members))].scalar != scalar:
        what = "a language model, and method=reward takes a reward model: a sequence classifier with one label"
        if scalar:
            what = f"a reward model, which gives a number and no log-probabilities: method=reward, not {method.label}"
        raise Refusal(f"this is {what}", code="wrong_head", key="method")


def needs(method: MethodOptions) -> Needs:
    """What a method asks for; of a mix, what its methods ask for together."""
    rows = [NEEDS[name] for name in method.members]
    held = any(constraint.needs_reference for constraint in (method.constraints or {}).values())
    if not method.mix:
        return replace(rows[0], reference=rows[0].reference or held)
    return Needs(
        reference=held or any(row.reference for row in rows),
        learning_rate=min(row.learning_rate for row in rows),
        strength=any(row.strength for row in rows),
    )


def beta_of(method: MethodOptions, given: float | None = None) -> float | None:
    """The beta that a method computes with: the one that was given, else its own default; None where it reads none.

    Raises:
        Refusal: none was given, and the methods of a mix have different ones.
    """
    own = {beta for name in method.members if (beta := NEEDS[name].beta) is not None}
    if given is None and len(own) > 1:
        line = f"{method.label} have different defaults ({', '.join(f'{beta:g}' for beta in sorted(own))}): name one for all"
        raise Refusal(line, code="missing_key", key="beta")
    return (given or min(own)) if own else None


def beta_said(method: MethodOptions, given: float | None) -> float | None:
    """The same for a method that the data chose: where it reads none, that is said of the one that was given."""
    beta = beta_of(method, given)
    if given is not None and beta is None:
        log.info(f"not used by {method.label}: beta")
    return beta


def check_beta(method: MethodOptions, given: float | None) -> None:
    """Refuses a beta that the method does not read, and a mix that cannot do without one. Without a name, nothing."""
    if method.members and beta_of(method, given) is None and given is not None:
        raise Refusal(f"{method.label} does not read it: leave it away", code="unused_key", key="beta")


def resolved(method: MethodOptions) -> MethodOptions:
    """With the defaults of its hyperparameters filled in; in a mix, of those on which its methods agree."""
    defaults: dict[str, set[float]] = {}
    for name in method.members:
        for key, value in NEEDS[name].reads.items():
            defaults.setdefault(key, set()).add(value)
    open_ = {key: min(values) for key, values in defaults.items() if len(values) == 1 and getattr(method, key) is None}
    return method.model_copy(update=open_)
