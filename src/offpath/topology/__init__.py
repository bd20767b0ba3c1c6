"""Which connections die and grow while training, and how layers share a budget of connections."""

from offpath.topology import drop as drop, grow as grow
from offpath.topology.budget import (
    Budget as Budget,
    PerLayer as PerLayer,
    Redistribute as Redistribute,
    Shrink as Shrink,
)
from offpath.topology.controller import Topology as Topology
from offpath.topology.distributed import check_same_connections as check_same_connections
from offpath.topology.distribution import DISTRIBUTIONS as DISTRIBUTIONS, layer_densities as layer_densities
from offpath.topology.errors import TopologyError as TopologyError
from offpath.topology.layer import LayerView as LayerView
from offpath.topology.quotas import Quota as Quota
from offpath.topology.recipe import Recipe as Recipe
from offpath.topology.recipes import (
    GMP as GMP,
    MEST as MEST,
    SET as SET,
    RigL as RigL,
    Static as Static,
)
from offpath.topology.record import (
    LayerState as LayerState,
    LayerUpdate as LayerUpdate,
    TopologyUpdate as TopologyUpdate,
)
from offpath.topology.schedules import Constant as Constant, Cosine as Cosine, Cubic as Cubic, Every as Every
