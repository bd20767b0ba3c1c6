"""Which connections exist: the frozen `Pattern`, how one is built, and how one is edited."""

from offpath.pattern.build import (
    from_csr as from_csr,
    from_dense as from_dense,
    from_mask as from_mask,
    from_positions as from_positions,
    full as full,
    random as random,
)
from offpath.pattern.draw import distinct as distinct
from offpath.pattern.edit import Edit as Edit, edit as edit
from offpath.pattern.pattern import (
    Pattern as Pattern,
    PatternError as PatternError,
    Transpose as Transpose,
    expect as expect,
)
