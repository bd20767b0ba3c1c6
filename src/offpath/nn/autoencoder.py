"""`SparseAutoencoder`: a wide dictionary of which each input uses a few entries, computed only where these are."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from offpath.nn.autocast import under_autocast
from offpath.nn.autoencoder_loss import SAELoss, expect_variance, variance_of
from offpath.nn.row_blocks import encode_above, encode_batch_topk
from offpath.nn.sparse_output import check_k
from offpath.nn.statistics import KeepsStatistics, is_recomputing
from offpath.nn.straight_through import jump, step, thresholds_of
from offpath.ops import SparseRows, encode_topk
from offpath.ops.library import is_differentiating, wide

ACTIVATIONS = ("topk", "batch_topk", "jumprelu")
# BatchTopK's threshold for inference follows the batches of about this many training steps.
THRESHOLD_STEPS = 100


class SparseAutoencoder(KeepsStatistics):
    """A sparse autoencoder whose encoder keeps, and whose decoder reads, only what is live.

    Input [..., d_model]. reconstruction = latents @ decoder_weight + decoder_bias, latents = activation((x -
    decoder_bias) @ encoder_weight.T + encoder_bias); both weights are [latents, d_model]. The activation is one of

    - "topk": the `k` largest of each row (Gao et al., "Scaling and evaluating sparse autoencoders", 2024);
    - "batch_topk": the k * rows largest of the batch; in `eval()`, those above a `threshold` that the training has
      averaged (Bussmann et al., 2024);
    - "jumprelu": those above a threshold of their own that is learned, with straight-through gradients of `bandwidth`
      and the penalty l0_coefficient * (L0 / k - 1)^2 (Rajamanoharan et al., 2024).

    Latents that are not positive are 0 and get no gradient. With `tied_init` the encoder starts as the decoder, whose
    rows have norm 1. A latent is dead when it has not fired for `dead_after` rows (`tokens_since_fired`, int64
    [latents]); the `k_aux` best dead ones of each row (d_model // 2 unless given) are trained to explain the residual.
    Raises `ValueError` for sizes and options that do not fit. A training step:

    >>> import torch
    >>> sae = SparseAutoencoder(d_model=8, latents=32, k=4)
    >>> optimizer = torch.optim.Adam(sae.parameters())
    >>> loss = sae.loss(torch.randn(64, 8))
    >>> loss.total.backward()
    >>> sae.project_decoder_gradient_()
    >>> optimizer.step()
    >>> sae.normalize_decoder_()
    >>> sae.encode(torch.randn(2, 8))
    SparseRows(shape=(2, 32), nnz=8, float32, 4 in a row)
    """

    threshold: Tensor
    tokens_since_fired: Tensor

    def __init__(
        self,
        d_model: int,
        latents: int,
        k: int = 32,
        activation: str = "topk",
        *,
        tied_init: bool = True,
        k_aux: int | None = None,
        aux_coefficient: float = 1 / 32,
        dead_after: int = 10_000_000,
        bandwidth: float = 0.001,
        l0_coefficient: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        k_aux = d_model // 2 if k_aux is None else k_aux
        if activation not in ACTIVATIONS:
            raise ValueError(f"expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if d_model < 1:
            raise ValueError(f"expected d_model of at least 1, got {d_model}")
        if not isinstance(k_aux, int) or k_aux < 0 or not dead_after >= 1:
            raise ValueError(
                f"expected k_aux of at least 0 and dead_after of at least 1, got {k_aux} and {dead_after}; "
                "aux_coefficient=0 turns the auxiliary loss off"
            )
        if not all(map(math.isfinite, (aux_coefficient, l0_coefficient))):
            raise ValueError(f"expected finite coefficients, got {aux_coefficient} and {l0_coefficient}")
        if not (math.isfinite(bandwidth) and bandwidth > 0):
            raise ValueError(f"expected a positive bandwidth, got {bandwidth}")
        self.d_model, self.latents, self.activation = d_model, latents, activation
        self.k = k
        self.tied_init, self.k_aux, self.dead_after = tied_init, k_aux, dead_after
        self.aux_coefficient, self.l0_coefficient, self.bandwidth = aux_coefficient, l0_coefficient, bandwidth
        self.encoder_weight, self.decoder_weight = (
            nn.Parameter(torch.empty(latents, d_model, device=device, dtype=dtype)) for _ in range(2)
        )
        self.encoder_bias = nn.Parameter(torch.empty(latents, device=device, dtype=dtype))
        self.decoder_bias = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        if activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.empty(latents, device=device, dtype=dtype))
        elif activation == "batch_topk":
            wide = torch.promote_types(self.encoder_bias.dtype, torch.float32)  # as KeepsStatistics keeps it
            self.register_buffer("threshold", torch.empty((), device=device, dtype=wide))
        self.register_buffer("tokens_since_fired", torch.empty(latents, dtype=torch.int64, device=device))
        self.reset_parameters(generator)

    @property
    def k(self) -> int:
        """How many latents live in a row (on average; of JumpReLU, what L0 is drawn to): to be set by a schedule."""
        return self._k

    @k.setter
    def k(self, k: int) -> None:
        self._k = check_k(k, 1, self.latents)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw decoder rows of norm 1, the encoder as a copy or likewise; biases 0, thresholds 0.001, all alive."""
        self.tokens_since_fired.zero_()
        if self.decoder_weight.is_meta:
            return
        for weight in (self.decoder_weight, self.encoder_weight):
            # Drawn on the CPU so that a seed gives the same numbers on every device.
            draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64, device="cpu")
            weight.copy_(nn.functional.normalize(draw))
            if self.tied_init:
                self.encoder_weight.copy_(weight)
                break
        self.encoder_bias.zero_()
        self.decoder_bias.zero_()
        if self.activation == "jumprelu":
            self.log_threshold.fill_(math.log(0.001))
        elif self.activation == "batch_topk":
            self.threshold.fill_(torch.nan)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of `x` [..., d_model], in its shape."""
        return self.decode(self.encode(x)).view(x.shape)

    def encode(self, x: Tensor) -> SparseRows:
        """The latents of `x` [..., d_model] as sparse rows [rows, latents], one for each leading position.

        In `eval()`, no threshold of JumpReLU gets a gradient from them; from `loss` it does.
        Raises `ValueError` for another width, and for "batch_topk" in `eval()` before it has a threshold.
        """
        rows, thresholds = self._scores(self._centered(x), self.training)
        return rows if thresholds is None else self._jumped(rows, thresholds)

    def decode(self, rows: SparseRows) -> Tensor:
        """The reconstruction [rows, d_model] of latents [rows, latents]. Raises `ValueError` for others."""
        if not isinstance(rows, SparseRows) or rows.columns != self.latents:
            got = f"{type(rows).__name__} of shape {tuple(rows.shape)}"
            raise ValueError(
                f"expected SparseRows of {self.latents} latents, got {got}; SparseRows.from_dense makes them"
            )
        _, weight, _ = under_autocast(rows.values, self.decoder_weight, None)
        return rows.to(weight.dtype).matmul(weight) + self.decoder_bias

    def loss(self, x: Tensor) -> SAELoss:
        """The loss of a batch `x` [..., d_model]; in `train()`, also counts which latents fired.

        An empty batch has the loss 0. Raises `ValueError` for rows that are all the same: they have no variance of
        which a part could be explained.
        """
        x = x.reshape(-1, x.shape[-1]) if x.dim() else x
        centered, variance = self._centered(x), variance_of(x)
        expect_variance(variance, x.shape[0])  # before all else: a GPU is waited for while it has little to do
        rows, thresholds = self._scores(centered, torch.is_grad_enabled() or is_differentiating())
        live = rows if thresholds is None else self._jumped(rows, thresholds)
        fired = live.values > 0
        if self.training and not is_recomputing():
            self._count(live, fired)
        residual = x - self.decode(live)
        squares = residual.square().sum()
        fvu = squares / variance.to(squares.dtype) if x.shape[0] else residual.sum() * 0
        total = fvu.clone()  # who scales it in place does not scale what it consists of
        aux = l0_loss = fvu.new_zeros(())
        dead = self.tokens_since_fired >= self.dead_after
        if self.k_aux and self.aux_coefficient and self.training:  # or nobody has to wait for the number of them
            places = dead.nonzero()[:, 0]
            if len(places):
                aux = self._auxiliary_loss(x, residual.detach(), places)
                total = total + self.aux_coefficient * aux
        if thresholds is not None and x.shape[0]:
            l0_loss = (step(rows.values, thresholds, self.bandwidth).sum() / x.shape[0] / self.k - 1).square()
            total = total + self.l0_coefficient * l0_loss
        return SAELoss(
            total=total,
            fvu=fvu,
            aux=aux,
            l0_loss=l0_loss,
            mse=squares.detach() / max(1, residual.numel()),
            l0=fired.sum(dtype=fvu.dtype) / max(1, x.shape[0]),
            dead_latents=dead,
        )

    @torch.no_grad()
    def calibrate_threshold_(self, x: Tensor) -> None:
        """Set the threshold, or JumpReLU's of every latent, so that `x` [..., d_model] has about `k` live in a row.

        Raises `ValueError` for "topk", which has no threshold, and where fewer pre-activations are positive.
        """
        if self.activation == "topk":
            raise ValueError("expected a batch_topk or jumprelu autoencoder: topk has no threshold")
        centered = self._centered(x)
        if not centered.shape[0]:
            raise ValueError("expected rows to calibrate the threshold on, got an empty batch")
        chosen = encode_batch_topk(*self._encoder(centered), self.k * centered.shape[0])
        if chosen.nnz < self.k * centered.shape[0]:
            raise ValueError(
                f"expected {self.k * centered.shape[0]} positive pre-activations of which the least is the threshold, "
                f"got {chosen.nnz} from {centered.shape[0]} rows"
            )
        least = chosen.values.min()
        if not least.isfinite():
            raise ValueError(f"expected finite pre-activations, got one of {float(least)}; look for NaN in the input")
        # Only what is larger than a threshold lives.
        if self.activation == "jumprelu":
            log, eps = wide(least).log(), torch.finfo(self.log_threshold.dtype).eps
            self.log_threshold.copy_((log - 2 * eps * log.abs().clamp(min=1)).expand(self.latents))
        else:
            self.threshold.copy_(least.nextafter(least.new_tensor(-math.inf)))

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Give each row of the decoder norm 1: call it after every step of the optimizer. A row of zeros stays."""
        self.decoder_weight.copy_(nn.functional.normalize(self.decoder_weight))

    @torch.no_grad()
    def project_decoder_gradient_(self) -> None:
        """Remove from the decoder's gradient what is parallel to each row: call it before every step of the optimizer.

        It would change the norm of a row, which is set to 1 again afterwards (Bricken et al., "Towards
        Monosemanticity", 2023).
        """
        if self.decoder_weight.grad is not None:
            rows = nn.functional.normalize(self.decoder_weight)
            along = (self.decoder_weight.grad * rows).sum(1, keepdim=True)
            self.decoder_weight.grad.addcmul_(along, rows, value=-1)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, latents={self.latents}, k={self.k}, activation={self.activation!r}"

    def _centered(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.d_model:
            raise ValueError(f"expected an input [..., {self.d_model}], got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"expected an input of a floating dtype, got {x.dtype}; convert it by x.float()")
        return x.reshape(-1, self.d_model) - self.decoder_bias

    def _encoder(self, centered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centered, weight, bias = under_autocast(centered, self.encoder_weight, self.encoder_bias)
        assert bias is not None
        if centered.dtype is not weight.dtype:
            raise ValueError(f"expected an input of {weight.dtype}, got {centered.dtype}; convert it by x.to(...)")
        return centered, weight, bias

    def _scores(self, centered: Tensor, trains: bool) -> tuple[SparseRows, Tensor | None]:
        """The chosen latents; for JumpReLU, also the threshold of each entry, and entries that only train one.

        Unless it `trains`: without these, a threshold would have a part of its gradient.
        """
        operands = self._encoder(centered)
        if self.activation == "topk":
            return encode_topk(*operands, self.k).relu(), None
        if self.activation == "batch_topk":
            if self.training:
                return encode_batch_topk(*operands, self.k * centered.shape[0]), None
            if self.threshold.isnan():
                raise ValueError(
                    "expected a threshold for eval(), but nothing has set it yet; train with loss(), or call "
                    "calibrate_threshold_"
                )
            return encode_above(*operands, self.threshold.expand(self.latents)), None
        thresholds = self.log_threshold.exp() if trains else self.log_threshold.exp().detach()
        margin = self.bandwidth / 2 if trains else 0.0
        # Wide: in 16 bits, a threshold less half a bandwidth may be the threshold itself.
        rows = encode_above(*operands, wide(thresholds.detach()) - margin)
        return rows, thresholds_of(rows, thresholds)

    def _jumped(self, rows: SparseRows, thresholds: Tensor) -> SparseRows:
        return rows.with_values(jump(rows.values, thresholds, self.bandwidth))

    def _auxiliary_loss(self, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """AuxK (Gao et al., 2024): how much of the residual the best dead latents leave unexplained."""
        centered, weight, bias = self._encoder(self._centered(x))
        rows = encode_topk(centered, weight[dead], bias[dead], min(self.k_aux, len(dead))).relu()
        _, decoder, _ = under_autocast(rows.values, self.decoder_weight[dead], None)
        error, variance = residual - rows.to(decoder.dtype).matmul(decoder), variance_of(residual)
        return error.sum() * 0 if variance == 0 else error.square().sum() / variance.to(error.dtype)

    @torch.no_grad()
    def _count(self, live: SparseRows, fired: Tensor) -> None:
        self.tokens_since_fired += live.shape[0]
        # As a minimum, since to look for those that fired would wait for a GPU.
        counts = torch.where(fired, 0, torch.iinfo(torch.int64).max)
        self.tokens_since_fired.scatter_reduce_(0, live.indices.long(), counts, "amin")
        if self.activation == "batch_topk" and live.nnz:
            least = live.values.min().to(self.threshold.dtype)
            followed = self.threshold.lerp(least, 1 / THRESHOLD_STEPS)
            followed = torch.where(self.threshold.isnan(), least, followed)
            self.threshold.copy_(torch.where(least.isfinite(), followed, self.threshold))
