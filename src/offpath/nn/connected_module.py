"""A module with connections, and the number that tells whether what it was given since belongs to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from offpath.ops import Connections, keep_all_columns
from offpath.ops.library import is_faking, is_in_a_mode, is_transforming, unwrapped

# What an average of equal digests may be off by: torch averages whole numbers in float32, so that each update rounds by
# 2^-24 of them, and an update by 2^-10 of the difference does not mend that. Different ones are hardly ever so close.
AVERAGING_ERROR = 2**-12


class ConnectedModule(nn.Module):
    """`_connections`, and beside them their digest as a buffer, which a call looks at."""

    topology_digest: Tensor
    _connections: Connections
    _digest: int
    _digest_seen: tuple[int, int] | None = None  # which buffer, after how many writes

    def _set_connections(self, connections: Connections) -> None:
        before, new_digest = getattr(self, "_connections", None), connections.digest()
        if before is not None and before is not connections:
            before.outdate()
        self._connections = connections
        # DistributedDataParallel broadcasts one process's values to all, AveragedModel averages them, and this number
        # goes along: where topologies differ it no longer fits, instead of values landing on other connections unseen.
        self._digest = new_digest
        self._digest_seen = None
        digest = torch.tensor(self._digest, device=connections.device)
        there = self._buffers.get("topology_digest")
        if there is None or there.device != digest.device or there.is_inference() or there.is_meta:
            self.register_buffer("topology_digest", digest, persistent=False)
        else:
            there.copy_(digest)  # in place: who shares the memory, as another process may, has to hear of it

    def _check_there(self) -> None:
        if self._connections.is_meta:
            raise RuntimeError(
                "expected a layer with connections, but this one left them on the meta device, where tensors hold "
                "nothing; load a checkpoint with load_state_dict(..., assign=True), or build the layer on its device"
            )

    def _check_digest(self) -> None:
        # As an attribute, nn.Module would look for it in three places, in Python.
        buffer: Tensor = self._buffers["topology_digest"]  # type: ignore[assignment]  # it is never None
        if buffer.is_meta or is_faking():
            return
        seen = None
        if not buffer.is_cpu:
            # To look is to wait for the device, and no graph can be captured meanwhile: only once after each write.
            seen = id(buffer), -1 if buffer.is_inference() else buffer._version
            if seen == self._digest_seen or (buffer.is_cuda and torch.cuda.is_current_stream_capturing()):
                return
        # An ensemble in one call (torch.func.vmap) has the digests of all of its members.
        for found in unwrapped(buffer).flatten().tolist() if is_transforming() else (buffer.item(),):
            if found != self._digest and abs(found - self._digest) > AVERAGING_ERROR * abs(self._digest):
                self._check_there()
                raise RuntimeError(
                    "expected values that belong to this layer's topology, but those of another one have been averaged "
                    "or broadcast into it: the topologies differ. A model that averages one whose connections move has "
                    "to be named in also=[...] where the topology is made. In many processes, build the model from one "
                    "seed in every process, or load one checkpoint in all of them, before wrapping it. After "
                    "to_empty(), load a checkpoint or call reset_parameters()"
                )
        if seen != self._digest_seen:  # nn.Module takes a microsecond to set an attribute
            self._digest_seen = seen

    def _check_given_away(self) -> None:
        """The look of a call, before values leave with connections: whoever takes both believes that they match.

        What has left its connections on meta has none to give; of fake tensors and in a graph, no number can be read.
        """
        if not (torch.compiler.is_compiling() or self._connections.is_meta or is_in_a_mode()):
            self._check_digest()

    def _check_when_compiled(self) -> None:
        """What every call of an eager layer looks at, looked at once: when the call is compiled."""
        if torch.compiler.is_dynamo_compiling():
            self._looked_at()
        else:
            keep_all_columns()

    def _looked_at(self) -> bool:
        # Before torch 2.12, the compiler takes no module as the argument of what it is to call, but its own method.
        if not isinstance(self.topology_digest, FakeTensor):
            self._check_digest()
        return self._keep_columns()

    def _keep_columns(self) -> bool:
        keep_all_columns()
        return True

    # All that torch.compiler.assume_constant_result does, which brings the compiler with it: seconds of an import.
    _looked_at._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions declare no attributes
    _keep_columns._dynamo_marked_constant = True  # type: ignore[attr-defined]  # nor does this one
