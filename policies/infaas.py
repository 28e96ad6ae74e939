"""INFaaS++: load-aware dispatch and scaling, no migration (the baseline in the Llumnix paper).

INFaaS (ATC '21) as extended there: dispatch to the least loaded instance by memory, waiting
requests included, and scaling by the same range as Llumnix. Departure: load is freeness over the
whole queue rather than INFaaS's own utilisation, as the comparison in the paper has it.
"""

from llumsched.core.policy import PolicyBundle
from llumsched.policies.freeness import Freeness
from llumsched.policies.freeness_range import FreenessRange


def bundle() -> PolicyBundle:
    """Comparison: freeness dispatch over the whole queue, no migration (INFaaS++)."""
    return PolicyBundle(
        name="infaas", dispatch=Freeness(queue="whole", room_first=False), scaling=FreenessRange()
    )
