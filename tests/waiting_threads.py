"""How threads wait, said before torch is imported: asleep, and one alone unless a test asks for more.

OpenMP's threads spin while they wait for one another. Where something else runs on their cores - a second worker of
the tests is enough - small products then take many times as long as they need. What threads could change asks for them:
the fixture `threads`, and tests of their own.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
