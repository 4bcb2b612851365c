"""Small environments shared by the scripts; importing this package registers them with Gymnasium."""

from gymnasium.envs.registration import register
from gymnasium.wrappers import FilterObservation, FlattenObservation

register(
    id="FourRoom-v0",
    entry_point="envs.four_room:FourRoomEnv",
    vector_entry_point="envs.four_room:FourRoomVectorEnv",
)
register(
    id="AntUMaze-v0",
    entry_point="envs.u_maze:AntUMazeEnv",
    vector_entry_point="envs.u_maze:AntUMazeVectorEnv",
    max_episode_steps=500,
)
register(
    id="PointUMaze-v0",
    entry_point="envs.u_maze:PointUMazeEnv",
    vector_entry_point="envs.u_maze:PointUMazeVectorEnv",
    max_episode_steps=200,
)
register(
    id="PointUMazeFlat-v0",  # with vectors of state and goal, for algorithms that know nothing of goals
    entry_point="envs.u_maze:PointUMazeEnv",
    max_episode_steps=200,
    additional_wrappers=(
        FilterObservation.wrapper_spec(filter_keys=["observation", "desired_goal"]),
        FlattenObservation.wrapper_spec(),
    ),
)
register(
    id="PointMass-v0",
    entry_point="envs.point_mass:PointMassEnv",
    vector_entry_point="envs.point_mass:PointMassVectorEnv",
    max_episode_steps=200,
)
