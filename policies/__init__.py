"""The policies that ship: one module a policy, named here once.

`BUILT_IN` is what `setup.py` registers under the entry-point group `llumsched.policies`. Nothing of
ours is imported here: a policy is loaded when it is asked for.
"""

from collections.abc import Mapping
from types import MappingProxyType

BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        # Bundles
        "adaptive": "llumsched.policies.adaptive:bundle",
        "latency": "llumsched.policies.latency:bundle",
        "throughput": "llumsched.policies.throughput:bundle",
        "long_context": "llumsched.policies.long_context:bundle",
        "late_binding": "llumsched.policies.late_binding:bundle",
        "prefix_aware": "llumsched.policies.prefix_aware:bundle",
        "slo": "llumsched.policies.slo:bundle",
        "disaggregated": "llumsched.policies.disaggregated:bundle",
        "infaas": "llumsched.policies.infaas:bundle",
        "distserve": "llumsched.policies.distserve:bundle",
        "splitwise": "llumsched.policies.splitwise:bundle",
        "tetriinfer": "llumsched.policies.tetriinfer:bundle",
        "memserve": "llumsched.policies.memserve:bundle",
        "mooncake": "llumsched.policies.mooncake:bundle",
        "dynamo": "llumsched.policies.dynamo:bundle",
        "llumnix": "llumsched.policies.llumnix:bundle",
        "llm_d": "llumsched.policies.llm_d:bundle",
        "dualmap": "llumsched.policies.dualmap:bundle",
        "maps": "llumsched.policies.maps:bundle",
        "star": "llumsched.policies.star:bundle",
        "dynaserve": "llumsched.policies.dynaserve:bundle",
        # Dispatch; each is also a bundle of its own
        "least_cost": "llumsched.policies.adaptive:LeastCost",
        "freeness": "llumsched.policies.freeness:Freeness",
        "round_robin": "llumsched.policies.round_robin:RoundRobin",
        "random": "llumsched.policies.random_choice:RandomChoice",
        "power_of_two": "llumsched.policies.power_of_two:PowerOfTwo",
        "least_requests": "llumsched.policies.least_requests:LeastRequests",
        "fill_target": "llumsched.policies.throughput:FillTarget",
        "prompt_length": "llumsched.policies.long_context:PromptLength",
        "freest_with_room": "llumsched.policies.late_binding:FreestWithRoom",
        "cached_prefix": "llumsched.policies.prefix_aware:CachedPrefix",
        "deadline_slack": "llumsched.policies.slo:DeadlineSlack",
        "prefill_pool": "llumsched.policies.disaggregated:PrefillPool",
        "shortest_prefill_queue": "llumsched.policies.distserve:ShortestPrefillQueue",
        "three_pools": "llumsched.policies.splitwise:ThreePools",
        "global_prompt_tree": "llumsched.policies.memserve:GlobalPromptTree",
        "conductor": "llumsched.policies.mooncake:Conductor",
        "kv_router": "llumsched.policies.dynamo:KvRouter",
        "weighted_scorers": "llumsched.policies.llm_d:WeightedScorers",
        "dual_hash": "llumsched.policies.dualmap:DualHash",
        "fewest_waiting_that_fits": "llumsched.policies.maps:FewestWaitingThatFits",
        "split_at_token": "llumsched.policies.dynaserve:SplitAtToken",
        # Migration
        "expected_win": "llumsched.policies.adaptive:ExpectedWin",
        "freeness_pairs": "llumsched.policies.freeness_pairs:FreenessPairs",
        "consolidate": "llumsched.policies.throughput:Consolidate",
        "clear_room": "llumsched.policies.long_context:ClearRoom",
        "deadline_pairs": "llumsched.policies.slo:DeadlinePairs",
        "hand_over": "llumsched.policies.disaggregated:HandOver",
        "least_loaded_decode": "llumsched.policies.distserve:LeastLoadedDecode",
        "prompt_to_token": "llumsched.policies.splitwise:PromptToToken",
        "hot_spots": "llumsched.policies.dualmap:HotSpots",
        "predicted_load_pairs": "llumsched.policies.star:PredictedLoadPairs",
        "planned_only": "llumsched.policies.dynaserve:PlannedOnly",
        "predicted_power_of_two": "llumsched.policies.tetriinfer:PredictedPowerOfTwo",
        # Scaling
        "freeness_range": "llumsched.policies.freeness_range:FreenessRange",
        "spare_instances": "llumsched.policies.throughput:SpareInstances",
        # Admission
        "preemption_bound": "llumsched.policies.throughput:PreemptionBound",
        "room_or_wait": "llumsched.policies.late_binding:RoomOrWait",
        "room_first": "llumsched.policies.long_context:RoomFirst",
        "deadline_admission": "llumsched.policies.slo:DeadlineAdmission",
        "early_rejection": "llumsched.policies.mooncake:EarlyRejection",
        "quota": "llumsched.policies.quota:Quota",
        # Victims
        "low_priority_short": "llumsched.policies.low_priority_short:LowPriorityShort",
        "after_first_token": "llumsched.policies.after_first_token:AfterFirstToken",
        # Length predictors
        "moving_quantile": "llumsched.policies.moving_quantile:MovingQuantile",
        "calibrated_bound": "llumsched.policies.calibrated_bound:CalibratedBound",
        "hazard_rate": "llumsched.policies.hazard_rate:HazardRate",
    }
)
"""Name -> `module:attribute`, where the attribute is a policy class or a function that returns a
`PolicyBundle`."""
