"""The simulator: the second host of :mod:`llumsched.core`, on a virtual clock.

It delivers events to the same ``GlobalScheduler`` that serves production traffic, with load reports
as old as they are in production, and carries the decisions out on modelled instances, migrations by
the same transition tables. It imports neither an engine nor Ray, so that it runs on a laptop with
none of them installed.

    trace ----> cluster <----> GlobalScheduler        simulation.simulate(trace, options)
                   |
                engines      segments of steps in closed form: engine_base, engine_batch
                   |
       cost, hardware, kv_cache, kernel               what a step takes, what fits, what is next
"""
