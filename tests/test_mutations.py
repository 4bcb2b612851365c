"""Small faults, put into the scripts one at a time: the tests find them. Takes long, so it runs only when asked for:

    python -m pytest -m slow tests/test_mutations.py

A fault is put into every script that has the line, as tests hold functions of one name equal. The first twelve are
those of the bug hunts in the course.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = "recall_a2c_fourroom", "per_a2c_fourroom", "recall_sac", "recall_trpo", "recall_goalgan_ant"
RESET_STATE = """next_states, terminated, truncated))
        states = np.array(next_states)"""
FAULTS = {  # what is wrong: (line, line with the fault)
    "actions of tuples are shifted by one": (
        "(*episode[t], returns[t])",
        "(episode[t][0], episode[t - 1][1], *episode[t][2:], returns[t])",
    ),
    "the reset state as next state": (
        RESET_STATE,
        """(next_states := np.array(next_states)), terminated, truncated))
        states = next_states""",
    ),
    "truncated as terminal": ("np.where(rollout.terminated, 0,", "np.where(rollout.terminated | rollout.truncated, 0,"),
    "terminal as truncated": ("np.where(tuples.terminated, 0, next_v)", "next_v"),
    "imagined actions stay normalised": ("actions = self.action_mean + self.action_std * (", "actions = ("),
    "a trace holds s_{t+1} in place of s_t": (
        "steps.append((states, actions))",
        "steps.append((next_states, actions))",
    ),
    "sign of the tanh's slope": ("math.log(2 * math.pi) - log_slope", "math.log(2 * math.pi) + log_slope"),
    "importance weights are not divided by the largest": (
        "(powers[slots] / powers.min()) ** -beta",
        "(len(self) * powers[slots] / powers.sum()) ** -beta",
    ),
    "the target network has no lag": ("lerp_(weight.detach(), args.tau)", "lerp_(weight.detach(), 1 - args.tau)"),
    "V(s) in place of V(s')": ("for s in tuples.next_states.split(1000)", "for s in tuples.states.split(1000)"),
    "variance for standard deviation": (
        "((change - mean) / log_std.exp()) ** 2",
        "(change - mean) ** 2 / log_std.exp()",
    ),
    "priorities in the wrong slots": ("buffer.powers[slots] =", "buffer.powers[slots[::-1]] ="),
    "advantages run into the next episode": ("~(rollout.terminated | rollout.truncated)", "~rollout.terminated"),
    "advantages decay by lambda alone": ("decay = gamma * gae_lambda *", "decay = gae_lambda *"),
    "the entropy is made small": ("- args.ent_coef * entropy", "+ args.ent_coef * entropy"),
    "a loop is cut in part": ("kept.popitem()", "kept.pop(state)"),
    "returns-to-go are not discounted": ("reward + self.gamma * later", "reward + later"),
    "the least valuable tuples": ("key=lambda step: -step[4]", "key=lambda step: step[4]"),
    "the worst trajectories are kept": ("[-self.capacity :]", "[: self.capacity]"),
    "traces go on beyond the start": ("next_states = states[states != first_state]", "next_states = states"),
    "traces are unlearned": ("imitation_loss = -log_probs[", "imitation_loss = log_probs["),
    "states and actions share embeddings": ("self.num_states + actions), dim=1", "actions), dim=1"),
    "predecessors that do not exist": ("self.predecessors[next_states] == -1", "self.predecessors[next_states] == -2"),
    "new transitions get priority 1": ("self.powers[: len(self)].max(initial=0) or 1.0", "1.0"),
    "negative advantages are replayed": ("np.maximum(tuples.returns - v, 0)", "(tuples.returns - v)"),
    "importance weights upside down": ("powers.min()) ** -beta", "powers.min()) ** beta"),
    "the larger of both critics": ("next_actions).amin(0)", "next_actions).amax(0)"),
    "a value after the end": ("args.gamma * (1 - batch.terminated) * next_values", "args.gamma * next_values"),
    "the wrong target entropy": ("(entropy + actions.shape[-1])", "(entropy - actions.shape[-1])"),
    "changes of state point forward": (
        "changes = tuples.states - tuples.next_states",
        "changes = tuples.next_states - tuples.states",
    ),
    "traces that have ended go on": (".cumprod(0).bool()", ".bool()"),
    "the noise of states has full size": (
        "args.state_noise * log_std.exp() * torch.randn_like(mean)\n        return",
        "log_std.exp() * torch.randn_like(mean)\n        return",
    ),
    "the full buffer stands still": ("self.added % len(column)", "min(self.added, len(column) - 1)"),
    "conjugate gradients": ("residual + square / last * direction", "residual + last / square * direction"),
    "Fisher matrix of the log std": ("(2 * of_log_std, *gradient)", "(of_log_std, *gradient)"),
    "a step outside the trust region": ("if gain > 0 and kl <=", "if gain > 0 or kl <="),
    "a failed step stays": ("    actor.load_state_dict(old_actor.state_dict())\n", ""),
    "the step is too short": ("(2 * args.max_kl /", "(args.max_kl /"),
    "the critic's bias is not rescaled": (".div_(self.scale.std)", ""),
    "returns-to-go begin one step early": (
        "np.append(episode.rewards[1:], later)",
        "np.append(episode.rewards[:-1], later)",
    ),
    "goals that are always reached": ("(rates < args.most_success)", "(rates <= args.most_success)"),
    "the discriminator's targets": ("(2 * labels - 1)) ** 2", "labels) ** 2"),
    "steps after the goal are imitated": ("inside.masked_scatter(inside, far.to(inside.device))", "inside"),
    "old goals crowd together": (".norm(dim=-1) >= distance", ".norm(dim=-1) > 0"),
    "the random state is not resumed": ('torch.set_rng_state(checkpoint["rng"])', 'checkpoint["rng"]'),
    "curves keep what was lost": ("purge_step=step", "purge_step=None"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, tmp_path):
    for folder in ("envs", "tests", "docs"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.gif", "*.png")
        )
    for path in (*ROOT.glob("*.py"), ROOT / "README.md", ROOT / "requirements.txt"):
        shutil.copy(path, tmp_path)
    right, wrong = FAULTS[fault]
    scripts = [name for name in SCRIPTS if right in (tmp_path / f"{name}.py").read_text()]
    assert scripts
    for name in scripts:
        text = (tmp_path / f"{name}.py").read_text()
        assert text.count(right) == 1
        (tmp_path / f"{name}.py").write_text(text.replace(right, wrong))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider"]
    for tests in ([f"tests/test_{name}.py" for name in scripts], ["tests/test_runs.py", "-k", " or ".join(scripts)]):
        found = subprocess.run([*command, *tests], cwd=tmp_path, capture_output=True, text=True)
        assert found.returncode in (0, 1), found.stdout
        if found.returncode == 1:
            print(fault, "|", *re.findall("FAILED (.*)", found.stdout))
            return
    pytest.fail(f"no test has found that {fault}")
