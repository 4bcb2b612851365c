"""E13 A question of your own

Ask one question about recall traces and answer it by experiment. What counts is the way, not the outcome: a null
result that is well shown earns all points.

Before the first run hand in one page, the registration: the question; the measure and the figure that will show it; the
baseline and how it is tuned; the seeds, at least five a setting; when you stop; which outcome would change your mind.
After that you may change it only by saying so.

Topics, or one of your own:

- How long may traces be before the policy collapses? (App. H)
- What happens if loops stay in the buffer's trajectories (`cut_loops`)?
- What is it worth to know the goal ahead of time, as mazes grow? (section 4)
- Prioritized replay and recall traces in one agent: do their gains add up?
- A slippery maze: what becomes of exact predecessors?
- Is the backtracking model calibrated? Compare its imagined predecessors with those of real trajectories.
- Dyna imagines forwards, recall traces backwards. Compare them at equal computing time.

Hand in the registration, the changed script as a diff, the commands, a CSV with a row for each run, and at most four
pages.

Points: question and registration 6, the diff is minimal and right 6, fair baseline 6, statistics 6, honest conclusion
6.

Reading: results/README.md of the project, for how claims are worded there.
"""

EXERCISE = {
    "number": 13,
    "scripts": [],
    "blank": [],
    "points": 30,
    "minutes": 1500,
    "difficulty": 5,
    "importance": 4,
    "seconds": 0,
}

# ------------------------------------------------------------------------------------------ never handed out
ORAL = [
    ("Which outcome would have changed your mind?", "One that the registration names."),
    ("How many settings did you try before the reported one?", "The number, with what became of the others."),
]
