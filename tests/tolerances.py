"""How far two ways to the same number may lie apart. One table, so that a loosened bound is seen.

Each is absolute, unless it says otherwise. float32 carries 24 bits; sums of some hundred terms in another order lose a few of
them.
"""

from __future__ import annotations

LOGP = 1e-4  # nats per response: the contract's bound for score against transformers' own log-softmax
GRADIENT = 2e-5  # the same gradient by another cut of the batch, entries of size 1
STEP = 1e-6  # relative: a step's loss, and its gradient by the largest entry, by another cut or order of its examples
WEIGHTS = 1e-5  # weights after three optimizer steps by another cut, learning rate 1e-3
FIRST_LOSS = 1e-6  # DPO's first loss against ln 2, float32
LOSS = 1e-6  # golden values, given to six decimals
EXACT = 1e-9  # float64 arithmetic against a formula by hand
OPTIMUM = 1e-6  # probabilities at the optimum of a convex loss
MERGED = 1e-5  # logits of an adapter and of the merged model
FIGURE = 1e-5  # means of float32 values in a metrics line
KL = 1e-5  # nats per response against an enumeration
RELATIVE = 1e-5  # a response's logp by another path in float32; a gradient of all parameters, by its length
TENSOR = 5e-5  # relative: the gradient of one parameter by another path, by its length
TREMBLES = 1e-3  # relative: a gradient of all parameters, by its length, when the last bit of each changes
BF16 = 2e-2  # nats per token: two passes in bfloat16
BF16_FARTHER = 2.0  # times the error of bfloat16 one by one against float32, which another path in bfloat16 may have
BF16_SUM = 1e-2  # of the largest entry: a gradient of micro-batches, by another order of its sums
BF16_LOGP = 0.5  # nats per response, where states in float32 come before a head in bfloat16
BF16_GRADIENT = 0.1  # relative: the gradient there
PARITY = 1e-5  # losses and their gradients against TRL's own loss code, float32
HUGE = {"float32": 1e-5, "bfloat16": 2e-2}  # relative: losses of 1e4 nats against the same in float64
FIT = 1e-4  # logits and probabilities of votes, fitted until they stand still, from another order of the same votes
DIFFERENCES = 1e-5  # a gradient of size 1 to 10 against central differences of step 1e-5, float64
CURVE = 1e-4  # relative: losses of 20 steps against those of another machine
