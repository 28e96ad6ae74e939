"""Decisions of the core, as messages to the processes that carry them out.

Invariant: every decision is told to somebody, or the core is told at once that it cannot be
carried out. Messages wait in ``outbox``, with the connection each is for: the host sends them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from llumsched.core.actions import (
    Action,
    DispatchRequest,
    LaunchInstance,
    PolicyFailed,
    RefuseMigration,
    RejectRequest,
    StartMigration,
    TerminateInstance,
)
from llumsched.core.events import Event, MigrationFinished, MigrationOutcome
from llumsched.scheduler.frontend_registry import FrontendRegistry
from llumsched.scheduler.instance_registry import InstanceRegistry
from llumsched.wire.control import (
    Message,
    OrderLaunch,
    OrderMigration,
    OrderTermination,
    Placed,
)

logger = logging.getLogger(__name__)


class ActionExecutor:
    """Args:
    instances: those that can be told something.
    frontends: those that wait for placements.
    handle: tells the core of an event.

    ``supervisor`` is the connection of whoever starts and ends instances, once it is there.
    """

    def __init__(
        self,
        instances: InstanceRegistry,
        frontends: FrontendRegistry,
        handle: Callable[[Event], object],
    ) -> None:
        self._instances = instances
        self._frontends = frontends
        self._handle = handle
        self._terminations: dict[str, OrderTermination] = {}
        self.supervisor: bytes | None = None
        self.outbox: list[tuple[bytes, Message]] = []

    def send(self, identity: bytes, message: Message) -> None:
        """Have a message sent to a connection."""
        self.outbox.append((identity, message))

    def take_outbox(self) -> list[tuple[bytes, Message]]:
        """Messages to be sent, in order; they are the caller's now."""
        outbox, self.outbox = self.outbox, []
        return outbox

    def supervised_by(self, identity: bytes) -> None:
        """Note the connection of the process that starts and ends instances."""
        self.supervisor = identity
        for order in self._terminations.values():
            self.send(identity, order)

    def tell_supervisor(self, message: Message) -> None:
        """Nothing, while nobody supervises: what lasts is told when somebody does."""
        if self.supervisor is not None:
            self.send(self.supervisor, message)

    def instance_lost(self, instance_id: str) -> None:
        """Note the end of an instance."""
        self._terminations.pop(instance_id, None)

    def carry_out(self, action: Action) -> None:
        """Tell whoever has to act on it."""
        match action:
            case DispatchRequest():
                self.answer_placement(
                    Placed(
                        request_id=action.request_id,
                        instance_id=action.instance_id,
                        engine_index=self._instances[action.instance_id].engine_index,
                        reason=action.reason,
                        predicted_output_tokens=action.predicted_output_tokens,
                        allowance=action.allowance,
                    )
                )
            case RejectRequest():
                self.answer_placement(
                    Placed(
                        request_id=action.request_id,
                        instance_id=None,
                        reason=action.reason,
                        retry_after_s=action.retry_after_s,
                        rejection=action.rejection,
                        allowance=action.allowance,
                    )
                )
            case StartMigration():
                self._order_migration(action)
            case RefuseMigration():
                pass  # answered by whoever asked
            case LaunchInstance():
                # Not decided before there is a supervisor.
                order_launch = OrderLaunch(launch_id=action.launch_id, reason=action.reason)
                self.tell_supervisor(order_launch)
            case TerminateInstance():
                order = OrderTermination(instance_id=action.instance_id, reason=action.reason)
                self._terminations[action.instance_id] = order
                self.tell_supervisor(order)
            case PolicyFailed():
                pass  # counted and logged by the controller

    def answer_placement(self, answer: Placed) -> None:
        """Tell the frontend that asked."""
        identity = self._frontends.of(answer.request_id)
        if identity is None:
            logger.warning("No frontend waits for the placement of %s", answer.request_id)
            return
        self.send(identity, answer)

    def _order_migration(self, action: StartMigration) -> None:
        source = self._instances.identities.get(action.source)
        destination = self._instances.get(action.destination)
        if source is None or destination is None:
            missing = action.source if source is None else action.destination
            self._handle(
                MigrationFinished(
                    migration_id=action.migration_id,
                    request_id=action.request_id,
                    source=action.source,
                    destination=action.destination,
                    outcome=MigrationOutcome.REFUSED,
                    reason=f"instance {missing} is not connected",
                )
            )
            return
        order = OrderMigration(
            migration_id=action.migration_id,
            destination=action.destination,
            destination_endpoint=destination.peer_endpoint,
            request_id=action.request_id,
            reason=action.reason,
            settle_s=action.settle_s,
            has_ended=action.has_ended,
        )
        self.send(source, order)
