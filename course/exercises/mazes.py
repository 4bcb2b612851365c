"""Small mazes for the cases of exercises."""

import numpy as np

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # (row, column) of up, right, down, left


def four_rooms(size):
    """The walls of the four-room maze, (size, size) bool."""
    walls = np.ones((size, size), bool)
    walls[1:-1, 1:-1] = False
    middle = size // 2
    walls[middle], walls[:, middle] = True, True
    for door in (middle // 2, (middle + size - 1) // 2):
        walls[middle, door] = walls[door, middle] = False
    return walls


def dynamics(walls, goal):
    """next_cell (S, A) and can_act (S,) of a maze with this goal (row, column)."""
    rows, columns = walls.shape
    next_cell = np.arange(walls.size)[:, None].repeat(4, axis=1)
    can_act = np.zeros(walls.size, bool)
    for row, column in np.ndindex(rows, columns):
        if walls[row, column] or (row, column) == tuple(goal):
            continue
        can_act[row * columns + column] = True
        for action, (down, right) in enumerate(MOVES):
            if not walls[row + down, column + right]:
                next_cell[row * columns + column, action] = (row + down) * columns + column + right
    return next_cell, can_act
