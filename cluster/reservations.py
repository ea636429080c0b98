"""Reserved cores whose owner has died go back to the cluster.

The controller of a training, an actor, reserves the resources of its workers as a placement group.
Ray keeps such a group until the whole job ends, even when the actor that made it is dead: lost with
its node, or with a step that was killed or stopped. The step that Ray then runs again would wait
for the cores of its own first attempt, for ever where there are no others.

Ray Train's remedy, `PlacementGroupCleanerCallback`, asks the dashboard, which a run's own Ray does
not have, and misses groups that still wait for resources. Here the driver of a run looks into Ray's
tables itself, which takes two milliseconds.
"""

from __future__ import annotations


def release_orphans() -> int:
    """Remove this job's placement groups whose maker, an actor, is dead; how many there were.

    Groups of the driver, of tasks, of living or restarting actors, of other jobs and detached ones
    stay. Needs a Ray that this process is attached to.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    # The public table of placement groups does not say who made them.
    rows = state._connect_and_get_accessor().get_placement_group_table()
    released = 0
    for row in map(PlacementGroupTableData.FromString, rows):
        removed = row.state == PlacementGroupTableData.REMOVED
        if removed or row.is_detached or row.creator_job_id.hex() != job:
            continue
        maker = state.actor_table(ray.ActorID(row.creator_actor_id).hex())  # {} where none made it
        if maker.get("State") == "DEAD":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(row.placement_group_id)))
            released += 1
    return released
