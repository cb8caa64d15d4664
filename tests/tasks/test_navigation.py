"""The navigator on a small building in R2R's public format, and on a grid with fixed actions."""

import json

import pytest
import torch

import vlmfast
from vlmfast.data import WordPieceTokenizer
from vlmfast.data.annotations import r2r
from vlmfast.tasks import Demonstration, Navigator, Observation, RouteWalk, navigation_loss, navigation_scores, table

PLACES = {"hall": (0, 0), "bath": (0, 4), "kitchen": (4, 0), "attic": (4, 4), "cellar": (8, 0)}
LINKS = {("hall", "bath"), ("hall", "kitchen"), ("kitchen", "attic"), ("kitchen", "cellar")}
ROUTES = [("hall", "bath"), ("hall", "kitchen"), ("hall", "kitchen", "attic"), ("hall", "kitchen", "cellar")]


def write_building(folder):
    """house_connectivity.json and R2R_train.json as the public files have them."""
    names = list(PLACES)
    records = [{"image_id": name, "included": True,
                "pose": [1, 0, 0, x, 0, 1, 0, y, 0, 0, 1, 1.5, 0, 0, 0, 1],
                "unobstructed": [(a, name) in LINKS or (name, a) in LINKS for a in names]}
               for name, (x, y) in PLACES.items()]  # fmt: skip
    (folder / "house_connectivity.json").write_text(json.dumps(records))
    routes = [{"path_id": i, "scan": "house", "path": list(path), "heading": 0.0, "distance": 4.0 * (len(path) - 1),
               "instructions": [f"walk to the {path[-1]}", f"go and find the {path[-1]} please"]}
              for i, path in enumerate(ROUTES)]  # fmt: skip
    (folder / "R2R_train.json").write_text(json.dumps(routes))
    return r2r.read_connectivity(folder / "house_connectivity.json"), list(r2r.read_r2r(folder / "R2R_train.json"))


@pytest.fixture
def building(tmp_path):
    graph, routes = write_building(tmp_path)
    generator = torch.Generator().manual_seed(0)
    return graph, routes, {name: torch.randn(8, generator=generator) for name in PLACES}


def model(texts, **fields):
    torch.manual_seed(0)
    tokenizer = WordPieceTokenizer.train(texts, 120)
    found = vlmfast.create("vlnbert-tiny", vocab_size=tokenizer.vocab_size, image_feat_dim=8, **fields)
    found.tokenizer = tokenizer
    return found


def learn(agent, batch, steps):
    optimizer, losses = torch.optim.Adam(agent.model.train().parameters(), lr=2e-3), []
    for _ in range(steps):
        loss = navigation_loss(agent.model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    agent.model.eval()
    return losses


def test_trains_evaluates_saves_and_reloads_to_identical_outputs(building, tmp_path):
    graph, routes, features = building
    texts = [route.instruction for route in routes]
    agent = Navigator(model(texts))
    shown = [RouteWalk(route, graph, features).demonstration() for route in routes]
    before = {name: value.clone() for name, value in agent.model.state_dict().items()}
    losses = learn(agent, agent.batch(shown), 60)
    assert losses[-1] < 0.2 * losses[0]
    still = {name for name, value in agent.model.state_dict().items() if torch.equal(value, before[name])}
    assert still <= {name for name in before if "key.bias" in name}, still  # a shift of all keys changes no attention

    def walked(agent):
        walks = [RouteWalk(route, graph, features) for route in routes]
        agent.run(texts, walks, max_steps=6)
        return [walk.path for walk in walks], navigation_scores([walk.trajectory() for walk in walks])

    paths, scores = walked(agent)
    assert scores.success_rate == 1 and scores.spl == pytest.approx(1) and scores.ndtw == pytest.approx(1)
    wanted = agent.scores(shown)
    vlmfast.save_pretrained(agent.model, tmp_path / "run")
    again = Navigator(vlmfast.load(tmp_path / "run"))
    assert torch.equal(again.scores(shown), wanted) and walked(again)[0] == paths


def test_the_instruction_the_views_and_the_memory_matter(building):
    graph, routes, features = building
    agent = Navigator(model([route.instruction for route in routes]).eval())
    walk = RouteWalk(routes[4], graph, features).demonstration()
    own = agent.scores([walk])
    other = agent.scores([Demonstration("find the bath", walk.observations, walk.choices)])
    assert not torch.allclose(own, other)
    turned = [Observation(seen.feat.flip(-1), seen.loc) for seen in walk.observations]
    assert not torch.allclose(own, agent.scores([Demonstration(walk.instruction, turned, walk.choices)]))
    first = [(walk.choices[0] + 1) % 3, *walk.choices[1:]]
    changed = agent.scores([Demonstration(walk.instruction, walk.observations, first)])
    assert torch.equal(changed[:, 0], own[:, 0]) and not torch.allclose(changed[:, 1], own[:, 1])


def test_padding_changes_nothing(building):
    graph, routes, features = building
    agent = Navigator(model([route.instruction for route in routes]).eval())
    walks = [RouteWalk(route, graph, features).demonstration() for route in routes]
    together = agent.scores(walks)
    for row, one in zip(together, walks, strict=True):
        alone = agent.scores([one])[0]
        for i, seen in enumerate(one.observations):
            count = len(seen.feat) + 1
            torch.testing.assert_close(row[i, :count], alone[i, :count], atol=1e-5, rtol=1e-5)
            assert (row[i, count:] == -torch.inf).all()


class Lights:
    """Two cells, one lit; the instruction says whether to go to the light (action 1) or away from it (2); 0 ends."""

    def __init__(self, lit):
        self.lit, self.done, self.chosen = lit, False, []

    def observe(self):
        feat = torch.zeros(2, 8)
        feat[self.lit, 0] = 1
        return Observation(feat, torch.eye(2))

    def act(self, choice):
        self.chosen.append(choice)
        self.done = choice == 0


def test_fixed_actions_over_a_grid_are_learned():
    texts = ["to the light", "away from the light"]
    agent = Navigator(model(texts, image_loc_dim=2, actions=3))
    cases = [(text, lit, [1 + (lit != k), 0]) for k, text in enumerate(texts) for lit in (0, 1)]
    shown = [Demonstration(text, [Lights(lit).observe()] * 2, choices) for text, lit, choices in cases]
    learn(agent, agent.batch(shown), 150)
    worlds = [Lights(lit) for _, lit, _ in cases]
    assert agent.run([text for text, _, _ in cases], worlds, max_steps=5) == [choices for _, _, choices in cases]
    assert agent.scores(shown).shape == (4, 2, 3)


def test_bad_input_is_named(building):
    graph, routes, features = building
    agent = Navigator(model([route.instruction for route in routes]))
    walk = RouteWalk(routes[0], graph, features)
    seen = walk.observe()
    with pytest.raises(ValueError, match="choice 9 of demonstration 0 does not exist"):
        agent.batch([Demonstration("go", [seen], [9])])
    with pytest.raises(ValueError, match="2 observations and 1 choices"):
        agent.batch([Demonstration("go", [seen, seen], [0])])
    with pytest.raises(ValueError, match="1 instructions and 0 environments"):
        agent.run(["go"], [])
    with pytest.raises(TypeError, match="model is Linear, must be a VLNBERT"):
        Navigator(torch.nn.Linear(1, 1))
    now = agent.model.start(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"image_feat: has shape \[1, 2, 5\], must be \[1, R, 8\]"):
        agent.model.step(now, torch.ones(1, 2, 5), torch.ones(1, 2, 4))
    with pytest.raises(ValueError, match="image_loc: is None"):
        agent.model.step(now, torch.ones(1, 2, 8))
    walk.act(2)
    with pytest.raises(ValueError, match="has left route"):
        walk.teacher()


def test_the_table_lists_it():
    (row,) = table("navigation")
    assert row.model == "VLNBERT" and row.interface == "Navigator" and row.metric == ("navigation_scores",)
