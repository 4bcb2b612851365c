"""Small environments shared by the scripts; importing this package registers them with Gymnasium."""

from gymnasium.envs.registration import register

register(
    id="FourRoom-v0",
    entry_point="envs.four_room:FourRoomEnv",
    vector_entry_point="envs.four_room:FourRoomVectorEnv",
)
