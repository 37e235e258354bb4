from __future__ import annotations

import random
import subprocess
import sys

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.mujoco_env import MujocoEnv

from trace_envs.snapshots import SnapshotUnsupportedError, adapter_for, restore, snapshot
from trace_envs.snapshots.adapters.mujoco import Mujoco, Simulation
from trace_envs.snapshots.compare import difference
from trace_envs.snapshots.record import EnvSnapshot

TASKS = (
    *("Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum"),
    *("Pusher", "Reacher", "Swimmer", "Walker2d"),
)

# Whatever the arena can hold: contacts of both kinds of friction cone, joints at their limits (a ball joint and one whose
# limits lie closer together than their margin among them), tendon limits, friction, equalities; activations, sensors,
# a mocap body, and integrators whose derived quantities are of another moment than the positions.
EVERYTHING = """
<mujoco>
  <option timestep="0.01" integrator="{integrator}" cone="{cone}"/>
  <worldbody>
    <geom type="plane" size="5 5 .1"/>
    <body name="hand" mocap="true" pos="0 0 1"><geom type="sphere" size=".05" contype="0" conaffinity="0"/></body>
    <body name="box" pos="0 0 .2"><freejoint/><geom type="box" size=".1 .1 .1"/></body>
    <body name="ball" pos="1 0 1"><joint name="ball" type="ball" limited="true" range="0 .4"/>
      <geom type="capsule" fromto="0 0 0 .3 0 0" size=".04"/>
      <body pos=".3 0 0"><joint name="hinge" type="hinge" axis="0 1 0" limited="true" range="-.5 .5" frictionloss=".1"/>
        <geom type="capsule" fromto="0 0 0 .3 0 0" size=".04"/></body></body>
    <body name="cart" pos="-1 0 .5"><joint name="slide" type="slide" axis="1 0 0" limited="true" range="-.1 .1" margin=".2"/>
      <geom type="sphere" size=".1"/>
      <body pos="0 0 .3"><joint name="pole" type="hinge" axis="0 1 0"/><geom type="sphere" size=".05" pos="0 0 .2"/>
      </body></body>
    <body name="twin" pos="-1 1 .5"><joint name="twin" type="slide" axis="1 0 0"/><geom type="sphere" size=".1"/></body>
  </worldbody>
  <tendon><fixed name="cord" limited="true" range="-.3 .3">
    <joint joint="pole" coef="1"/><joint joint="hinge" coef="1"/></fixed></tendon>
  <equality><joint joint1="twin" joint2="slide"/></equality>
  <actuator>
    <motor name="push" joint="slide" gear="20" ctrlrange="-1 1"/><motor joint="hinge" gear="5" ctrlrange="-1 1"/>
    <general joint="pole" gear="3" dyntype="filter" dynprm=".1" ctrlrange="-1 1"/>
  </actuator>
  <sensor><actuatorfrc actuator="push"/><framelinacc objtype="body" objname="box"/></sensor>
</mujoco>
"""


class Everything(MujocoEnv):
    """Observes derived quantities before it steps, and contact forces after."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, path: str):
        super().__init__(path, 3, gym.spaces.Box(-np.inf, np.inf, (0,)))
        self.metadata = {}
        self.wind = np.random.default_rng(3)
        self.dice = random.Random(4)
        self.log: list[float] = []
        self.view = self.data.xpos
        self.torso = self.data.body("box")
        self.mirror = {"env": self, "data": self.data, "log": self.log}

    def forces(self) -> list[np.ndarray]:
        found = []
        for i in range(self.data.ncon):
            found.append(np.zeros(6))
            mujoco.mj_contactForce(self.model, self.data, i, found[-1])
        return found

    def step(self, action):
        before = self.view.copy(), self.torso.cvel.copy(), self.forces(), self.data.sensordata.copy()
        self.data.xfrc_applied[2] = self.wind.normal(0, 20, 6)
        self.data.mocap_pos[0, 0] += self.dice.random()
        self.do_simulation(action, self.frame_skip)
        self.log.append(float(self.data.time))
        seen = self.data.efc_J.copy(), self.data.efc_force.copy(), self.data.qacc.copy(), len(self.mirror["log"])
        return self.state_vector(), 0.0, False, False, {"before": before, "forces": self.forces(), "seen": seen}

    def reset_model(self):
        self.log.clear()
        self.set_state(self.init_qpos, self.init_qvel + self.np_random.normal(0, 1, self.model.nv))
        return self.state_vector()


@pytest.fixture(params=[("Euler", "pyramidal"), ("RK4", "elliptic"), ("implicitfast", "elliptic")], ids="-".join)
def everything(request, tmp_path):
    path = tmp_path / "everything.xml"
    path.write_text(EVERYTHING.format(integrator=request.param[0], cone=request.param[1]))
    return lambda: Everything(str(path))


def actions(env: gym.Env, count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    low, high = env.action_space.low, env.action_space.high
    return [rng.uniform(low, high).astype(np.float32) for _ in range(count)]


def play(env: gym.Env, chosen: list[np.ndarray]) -> list[tuple]:
    return [env.step(action) for action in chosen]


@pytest.mark.parametrize("task", TASKS)
def test_futures_and_observations_repeat_bit_for_bit(task):
    env, sibling = (gym.make(f"{task}-v5").unwrapped for _ in range(2))
    assert isinstance(adapter_for(env), Mujoco)
    env.reset(seed=0)
    prefix, future = actions(env, 35, seed=1), actions(env, 50, seed=2)
    play(env, prefix)
    taken = snapshot(env)
    digest, data = taken.digest, taken.to_bytes()
    expected = play(env, future)
    sibling.reset(seed=7)
    play(sibling, actions(sibling, 12, seed=8))
    for other in (env, sibling):
        for source in (taken, EnvSnapshot.from_bytes(data)):
            restore(other, source)
            assert difference(taken, snapshot(other)) is None
            assert difference(expected, play(other, future)) is None
    assert taken.digest == digest == EnvSnapshot.from_bytes(data).digest


def test_a_fresh_reset_is_a_moment_too():
    env = gym.make("Ant-v5").unwrapped
    env.reset(seed=0)
    taken, future = snapshot(env), actions(env, 20, seed=0)
    expected = play(env, future), env.reset(seed=None)
    restore(env, taken)
    assert difference(expected, (play(env, future), env.reset(seed=None))) is None


def test_every_moment_of_a_model_with_every_kind_of_constraint(everything):
    env, sibling = everything(), everything()
    env.reset(seed=0)
    sibling.reset(seed=1)
    kinds = set()
    for action in actions(env, 80, seed=0):
        taken = snapshot(env)
        kinds |= set(taken.payload.rows.get("efc_type", np.array([], int)).tolist())
        expected = env.step(action)
        restore(sibling, taken)
        assert difference(taken, snapshot(sibling)) is None
        assert difference(expected, sibling.step(action)) is None
    named = mujoco.mjtConstraint
    wanted = {named.mjCNSTR_EQUALITY, named.mjCNSTR_FRICTION_DOF, named.mjCNSTR_LIMIT_JOINT, named.mjCNSTR_LIMIT_TENDON}
    assert {int(kind) for kind in wanted} < kinds
    assert kinds & {int(named.mjCNSTR_CONTACT_ELLIPTIC), int(named.mjCNSTR_CONTACT_PYRAMIDAL)}


def test_the_other_attributes_are_carried_and_windows_on_memory_stay_windows(everything):
    env, sibling = everything(), everything()
    env.reset(seed=0)
    play(env, actions(env, 10, seed=0))
    data = snapshot(env).to_bytes()
    expected = play(env, actions(env, 10, seed=1))
    restore(sibling, EnvSnapshot.from_bytes(data))
    assert len(sibling.log) == 10
    assert sibling.mirror["env"] is sibling and sibling.mirror["data"] is sibling.data
    assert sibling.mirror["log"] is sibling.log
    assert np.shares_memory(sibling.view, sibling.data.xpos)
    sibling.added = 1
    restore(sibling, EnvSnapshot.from_bytes(data))
    assert not hasattr(sibling, "added")
    assert difference(expected, play(sibling, actions(env, 10, seed=1))) is None


def test_a_seed_renews_the_generators_and_leaves_the_moment(everything):
    env = everything()
    env.reset(seed=0)
    play(env, actions(env, 10, seed=0))
    taken, future = snapshot(env), actions(env, 5, seed=1)
    expected = play(env, future)

    def branch(seed):
        restore(env, taken, seed=seed)
        assert np.array_equal(env.state_vector(), taken.payload.integration[1 : 1 + len(env.state_vector())])
        return play(env, future), env.np_random.random(), env.dice.random()

    first = branch(5)
    assert difference(first, branch(5)) is None
    assert difference(first, branch(6)) is not None
    assert difference(first[0], expected) is not None
    restore(env, taken)
    assert difference(expected, play(env, future)) is None


def test_a_window_on_memory_inside_another_object_is_refused_by_name(everything):
    env = everything()
    env.reset(seed=0)
    env.parts = {"xpos": env.data.xpos}
    with pytest.raises(SnapshotUnsupportedError, match=r"env\.parts\['xpos'\].*memory of MuJoCo"):
        snapshot(env)


def test_an_attribute_that_cannot_be_copied_is_refused_by_name():
    env = gym.make("Swimmer-v5").unwrapped
    env.reset(seed=0)
    env.source = (x for x in ())
    with pytest.raises(SnapshotUnsupportedError, match=r"env\.source"):
        snapshot(env)


@pytest.mark.parametrize("change", ["body_mass", "timestep", "gravity"])
def test_a_changed_model_is_noticed(change):
    env = gym.make("Hopper-v5").unwrapped
    env.reset(seed=0)
    taken = snapshot(env)
    if change == "body_mass":
        env.model.body_mass[1] *= 1.5
    elif change == "timestep":
        env.model.opt.timestep *= 0.5
    else:
        env.model.opt.gravity[2] += 1
    before = snapshot(env)
    with pytest.raises(ValueError, match=r"another MuJoCo model.*Replayable"):
        restore(env, taken)
    assert snapshot(env) == before


def test_models_that_are_loaded_again_by_a_reset_are_followed():
    env = gym.make("Hopper-v5").unwrapped
    env.reset(seed=0)
    taken, future = snapshot(env), actions(env, 5, seed=0)
    expected = play(env, future)
    env.model, env.data = env._initialize_simulation()
    env.reset(seed=3)
    restore(env, taken)
    assert difference(expected, play(env, future)) is None


def test_snapshots_of_other_environments_are_refused():
    class Mine(HalfCheetahEnv):
        pass

    class Yours(HalfCheetahEnv):
        pass

    def made(cls, **kwargs):
        env = cls(**kwargs)
        env.spec = gym.spec("HalfCheetah-v5")
        env.reset(seed=0)
        return env

    with pytest.raises(ValueError, match=r"holds the state of .*Mine.*Yours"):
        restore(made(Yours), snapshot(made(Mine)))
    taken = snapshot(made(Mine))
    broken = EnvSnapshot(taken.env_id, None, {"qpos": 1}, adapter="mujoco", config=taken.config)
    with pytest.raises(ValueError, match=r"holds the state of 'dict'"):
        restore(made(Mine), broken)
    with pytest.raises(ValueError, match="frame_skip"):
        skipping = gym.make("HalfCheetah-v5", frame_skip=2).unwrapped
        skipping.reset(seed=0)
        restore(skipping, snapshot(gym.make("HalfCheetah-v5").unwrapped))


def test_the_payload_is_plain_and_shares_nothing_with_the_environment():
    env = gym.make("Humanoid-v5").unwrapped
    env.reset(seed=0)
    play(env, actions(env, 30, seed=0))
    taken = snapshot(env)
    assert isinstance(taken.payload, Simulation)
    kept = [*taken.payload.arrays.values(), *taken.payload.contacts.values(), *taken.payload.rows.values()]
    assert kept and all(array.flags.owndata for array in [*kept, taken.payload.integration])
    assert len(taken.payload.contacts["dist"]) > 0


def test_another_process_goes_on_from_the_bytes(tmp_path):
    env = gym.make("Walker2d-v5").unwrapped
    env.reset(seed=0)
    play(env, actions(env, 40, seed=0))
    (tmp_path / "taken").write_bytes(snapshot(env).to_bytes())
    np.save(tmp_path / "actions.npy", actions(env, 20, seed=1))
    program = (
        "import sys, gymnasium as gym, numpy as np\n"
        "from trace_envs.snapshots import EnvSnapshot, restore\n"
        "env = gym.make('Walker2d-v5').unwrapped\n"
        "restore(env, EnvSnapshot.from_bytes(open(sys.argv[1] + '/taken', 'rb').read()))\n"
        "np.save(sys.argv[1] + '/seen.npy', [env.step(a)[0] for a in np.load(sys.argv[1] + '/actions.npy')])\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    expected = np.array([step[0] for step in play(env, actions(env, 20, seed=1))])
    assert difference(expected, np.load(tmp_path / "seen.npy")) is None


def test_mujoco_is_not_imported_for_other_environments():
    program = (
        "import sys, gymnasium as gym, trace_envs\n"
        "from trace_envs.snapshots import adapter_for\n"
        "assert adapter_for(gym.make('CartPole-v1').unwrapped).name != 'mujoco'\n"
        "assert 'mujoco' not in sys.modules and 'gymnasium.envs.mujoco' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
