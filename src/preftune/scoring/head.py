"""From hidden states to log-probabilities of given tokens, without the logits of all positions at once.

Whatever a model does after its backbone (bias, scale, soft-cap, an adapter on the head) is done by the model's own forward: it
is called with a stand-in for the backbone that hands the hidden states through. Where that turns out to be one plain matrix
product, which is asked and not assumed, `logp_of_product` computes it and its gradient in blocks. A model that cannot be called
like that is run as a whole, and its logits are read in blocks.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from preftune.data.render import Rendered
from preftune.errors import Refusal
from preftune.models.adapters import gives_scalars, is_checkpointed
from preftune.models.randomness import evaluation_mode
from preftune.scoring import product
from preftune.scoring.backbone import backbone
from preftune.scoring.product import AddedProduct, ChunkedLogp, entries_on, logp_of_product, rows_of_logits

log = logging.getLogger("preftune")

Value = Literal["entropy", "top1"]
Kind = Literal["logp", "scalar"]


_SAID: weakref.WeakSet[Any] = weakref.WeakSet()  # models whose head was said not to be plain


class Head:
    """The head of one model. One that is more than a matrix product is said, once.

    Args:
        model: a causal language model of transformers; its adapters, if any, are inside its modules.

    Raises:
        Refusal: a model that predicts no tokens.
    """

    def __init__(self, model: Any) -> None:
        self.output: Any = model.get_output_embeddings()
        if gives_scalars(model) or (self.output is None and not model.can_generate()):
            hint = 'head="scalar" gives its number' if gives_scalars(model) else "load it with AutoModelForCausalLM"
            raise Refusal(f"{type(model).__name__} predicts no tokens: {hint}", code="no_logp_head", key="head")
        self.body = backbone(model)
        self.shell = _without(model, self.body) if self.body is not None else None
        self.plain = self._is_plain()
        if not self.plain and not self._runs(model):
            self.body = self.shell = None
        weight = getattr(self.output, "weight", None)
        device = next(model.parameters()).device if weight is None else weight.device
        self.entries, self.wide = entries_on(device), product.WIDE
        self.kept = 0 if is_checkpointed(model) else product.KEPT  # who has layers computed again wants the memory
        # gives the tensor that the gradient of the weight of `layer` is added to in the backward pass; None: autograd gets it
        self.into: Callable[[], Tensor] | None = None
        if not self.plain and model not in _SAID:
            _SAID.add(model)
            how = "the head cannot be run by itself: the logits of all tokens are computed, response by response"
            own = "the head is more than one matrix product: it is run by the model's own code, a chunk at a time"
            log.info(f"{type(model).__name__}: {how if self.shell is None else own}")

    @property
    def layer(self) -> nn.Linear | None:
        """The one trained matrix product of a head that can be run by itself, also inside peft's wrapper of a saved module;
        None where somebody put a forward of their own into it."""
        inside = self.output.modules() if self.shell is not None and self.output is not None else ()
        trained = [module for module in inside if type(module) is nn.Linear and module.weight.requires_grad]
        return trained[0] if len(trained) == 1 and "forward" not in vars(trained[0]) else None

    @staticmethod
    def asked(sequence: Rendered) -> list[tuple[int, int]]:
        """(place of the state, token to predict there) for each scored token: its state is that of the token before it."""
        places = range(sequence.start, len(sequence.ids))
        mask = sequence.mask or [True] * len(places)
        return [(place - 1, sequence.ids[place]) for place, scored in zip(places, mask, strict=True) if scored]

    def __call__(self, hidden: Tensor, targets: Tensor, at_once: int = 1) -> Tensor:
        """log p(target | hidden) of each row.

        Args:
            hidden: [N, D].
            targets: [N] token ids.
            at_once: calls whose graphs stand at the same time, and share what may be kept for their backward passes.

        Returns:
            [N] nats, float32; the log-softmax is taken in float32 whatever the model's precision.
        """
        if self.plain:
            weight, bias = self.output.weight, self.output.bias  # hidden states may be float32 beside a bfloat16 head
            rows = rows_of_logits(len(weight), self.entries, self.wide)
            how: Any = {"rows": rows, "entries": self.entries, "kept": self.kept // at_once, "into": self.into}
            return logp_of_product(hidden.to(weight.dtype), weight, bias, targets, **how)
        rows = self._rows(hidden)
        # under an adapter that trains its dropout alone is on, in a model that is in evaluation mode
        drops = self.output is None or any(module.training for module in self.output.modules())
        logp = self._logp if drops else self._logp_without_dropout
        trained = [p for p in self.shell.parameters() if p.requires_grad] if self.shell is not None else []
        return ChunkedLogp.apply(hidden, targets, logp, rows, *trained)  # pyright: ignore

    def values(self, hidden: Tensor, want: tuple[Value, ...]) -> dict[Value, Tensor]:
        """[N] each, without a graph: `entropy` in nats; `top1`, the likeliest token."""
        found: dict[Value, list[Tensor]] = {name: [] for name in want}
        with torch.no_grad():
            for h in hidden.split(self._rows(hidden)):
                log_p = torch.log_softmax(self.logits(h).float(), -1)
                if "entropy" in found:
                    found["entropy"].append(torch.special.entr(log_p.exp()).sum(-1))  # 0 of a token that is ruled out
                if "top1" in found:
                    found["top1"].append(log_p.argmax(-1))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V], by the model's own forward. Of a model whose backbone cannot be told apart, `hidden` are its logits."""
        if self.shell is None:
            return hidden
        with self._adding() if torch.is_grad_enabled() else nullcontext():
            return self.shell(inputs_embeds=hidden[None], use_cache=False).logits[0]

    @contextmanager
    def _adding(self) -> Generator[None]:
        """Inside, the head's product adds its weight gradient to what `into` gives: else every chunk would make a tensor of the
        weight's size for it."""
        layer, into = self.layer, self.into
        if layer is None or into is None:
            yield
            return
        layer.forward = lambda x: AddedProduct.apply(x, layer.weight, layer.bias, into)  # pyright: ignore
        try:
            yield
        finally:
            del layer.forward

    def _logp_without_dropout(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """It runs again in the backward pass, when the model may be in training mode once more."""
        with evaluation_mode(self.output):
            return self._logp(hidden, targets)

    def _logp(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(hidden).float()
        return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)

    def _rows(self, hidden: Tensor) -> int:
        """How many positions at once, of a head whose own code may hold its logits several times."""
        weight = getattr(self.output, "weight", None)
        vocabulary = hidden.shape[-1] if self.shell is None or weight is None else weight.shape[0]
        return rows_of_logits(vocabulary, self.entries, product.FEWEST, product.OWN)

    def _runs(self, model: Any) -> bool:
        """Whether the model's own forward takes hidden states. They may be of another width than those of its last product."""
        some = next(model.parameters())
        for width in (getattr(self.output, "in_features", None), getattr(model.config.get_text_config(), "hidden_size", None)):
            rows = torch.zeros(3, width or 0, device=some.device, dtype=some.dtype)
            if width and (logits := self._tried(rows)) is not None and logits.shape[0] == len(rows):
                return True
        return False

    def _is_plain(self) -> bool:
        """Whether the model's own forward gives W h + b: it hands the output layer just what it was given, and returns just
        what that gave back, here of sizes at which a cap or a scale would show whatever the weights are."""
        if type(self.output) is not nn.Linear:
            return False
        weight = self.output.weight
        sizes = torch.tensor([[0.1], [1.0], [60.0]], device=weight.device, dtype=weight.dtype)
        given, back = (sizes * torch.linspace(-1, 1, n, device=weight.device, dtype=weight.dtype) for n in weight.shape[::-1])
        taken: list[Tensor] = []

        def instead(module: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> Tensor:
            taken.append(arguments[0])
            return back.reshape(result.shape)

        with self.output.register_forward_hook(instead):
            returned = self._tried(given)
        if returned is None or len(taken) != 1:
            return False
        # float32 of the same numbers is the same
        return torch.equal(taken[0].reshape(given.shape), given) and torch.equal(returned.float(), back.float())

    def _tried(self, rows: Tensor) -> Tensor | None:
        """Logits of hidden states, None where the model's own forward does not take them, whatever it says."""
        if self.shell is None:
            return None
        try:
            with torch.no_grad():
                return self.logits(rows)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None


class ScalarHead:
    """The head of a reward model: one number per response, at its last token.

    Args:
        model: a sequence classifier of transformers over a decoder, with one label.

    Raises:
        Refusal: a model without such a head.
    """

    plain = False

    def __init__(self, model: Any) -> None:
        self.body = backbone(model)
        self.output: Any = getattr(model, "score", None)
        told = callable(self.output) and self.body is not None
        if not told or not gives_scalars(model):
            what = f"gives {model.config.num_labels} numbers" if told else "has no head named score"
            line = f"{type(model).__name__} {what}; a scalar head is that of a sequence classifier with num_labels=1"
            raise Refusal(line, code="no_scalar_head", key="head")

    @staticmethod
    def asked(sequence: Rendered) -> list[tuple[int, int]]:
        """The last token's state; nothing is predicted there."""
        return [(len(sequence.ids) - 1, -1)]

    def __call__(self, hidden: Tensor, targets: Tensor, at_once: int = 1) -> Tensor:
        """[N] numbers of hidden states [N, D], float32."""
        return self.output(hidden).float().squeeze(-1)

    def values(self, hidden: Tensor, want: tuple[Value, ...]) -> dict[Value, Tensor]:
        raise Refusal(f"a scalar head has no {', '.join(want)}: there is no next token", code="unknown_want", key="want")


class _Handed:
    """What a backbone returns, as far as a head reads it: everything but the hidden states is absent."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, place: Any) -> Tensor:
        return (self.last_hidden_state,)[place]


class _HandThrough(nn.Module):
    """A backbone that returns the embeddings it is given as hidden states; its own decoder, where a head asks for that."""

    @property
    def decoder(self) -> nn.Module:
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Handed:
        return _Handed(inputs_embeds)


def _without(model: Any, body: nn.Module) -> Any:
    """The model with its backbone replaced; all its other modules are the same objects."""
    name = next(name for name, child in model.named_children() if any(inner is body for inner in child.modules()))
    shell = copy.copy(model)
    shell._modules = {**model._modules, name: _HandThrough()}
    return shell
