"""README.md and minisap/docs against the records in tests/golden that their tables are made from."""
import re
from pathlib import Path
from statistics import fmean

import eval as eval_script
from departures import rows_of as rows_of_departures
from minisap.checkpoint import read_json
from minisap.compare import Series
from minisap.evaluate import format_value
from minisap.laboratory import other_tables
from minisap.stats import wilson
from minisap.table import comparisons, legend, markdown, rows_of

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS, STUDY = (ROOT / name for name in ("README.md", "minisap/docs/results.md", "minisap/docs/study.md"))
README, RESULTS, STUDY = README.read_text(), RESULTS.read_text(), STUDY.read_text()
GOLDEN = ROOT / "tests" / "golden"


def runs_of(paths):
    """{method: {seed: records}} of run directories."""
    runs = {}
    for r in eval_script.read_runs(paths):
        runs.setdefault(r["method"], {}).setdefault(r["seed"], []).append(r)
    return runs


def test_the_real_model_s_tables_are_what_the_records_say():
    for p, share in (("0.125", "one in eight"), ("0.25", "one in four")):
        runs = runs_of(sorted(GOLDEN.glob(f"smollm2/p{p}-seed?")))
        header, *rows = rows_of(comparisons({method: runs[method] for method in ("sft", "sap", "mix")}), "sap")
        assert markdown([header, *rows]) in RESULTS
        for row in rows:
            method, harmful, refused, over, _, loss, _, safer, useful, _ = row
            assert f"| {share} | {' | '.join((method, harmful, refused, over, loss, safer, useful))} |\n" in README


def test_the_harmless_run_of_the_real_model_is_what_the_record_says():
    ends = {method: {r["metric"]: r for r in records[1] if r["step"] == 60} for method, records in runs_of([GOLDEN / "smollm2" / "p0-seed1"]).items()}
    harmful = {method: format_value(end["harmful_score"]).strip() for method, end in ends.items()}
    losses = ", ".join(f"{ends[method]['task_loss']['value']:.3f}" for method in ("sft", "sap", "mix"))
    told = f"SFT answers {harmful['sft']} afterwards, SAP {harmful['sap']}, `mix` {harmful['mix']}, at task losses of {losses}."
    assert told in re.sub(r"\s+", " ", README)


def test_the_world_s_curves_are_what_the_records_say(capsys):
    """Every number of the tables on a task that the start knows."""
    tables = [line.replace("**", "") for line in RESULTS.splitlines() if re.match(r"\| (\(start\)|\**`).*\d \[", line)]
    for record in ("world", "states", "benign"):
        eval_script.main([str(GOLDEN / "world" / f"{record}{seed}") for seed in range(5)] + ["--curves"])
    told = capsys.readouterr().out
    assert len(tables) == 8 + 8
    for line in tables:
        for cell in line.strip("| ").split(" | ")[1:]:
            assert cell in told, line


def test_the_departures_are_what_the_record_says():
    assert markdown(rows_of_departures(read_json(GOLDEN / "world" / "departures.json")["found"])) in RESULTS


def test_the_world_s_table_is_what_the_record_says():
    found = read_json(GOLDEN / "world" / "table.json")
    for setting in found["settings"].values():
        assert markdown(rows_of(setting, found["against"])) in RESULTS
    assert legend(found["settings"]["poisoned"], found["against"]) in re.sub(r"\s+", " ", RESULTS)
    for _, rows in other_tables(found):
        assert markdown(rows) in RESULTS
    of = {setting: {c["method"]: c for c in rows} for setting, rows in found["settings"].items()}
    cell = lambda c: f"{100 * c['harmful_score']:.1f} [{100 * c['ci_low']:.1f}, {100 * c['ci_high']:.1f}], {fmean(c['task_loss']):.3f}" if c else ""
    for method in of["poisoned"]:
        assert f"| `{method}` | {' | '.join(cell(of[setting].get(method)) for setting in of)} |\n" in README.replace("**", "")


def test_the_observations_are_what_the_record_says():
    for check in read_json(GOLDEN / "world" / "checks.json"):
        count = sum(check["holds"].values())
        word = {0: "**no**", 3: "yes"}.get(count, f"{count} of 3")
        assert f"| {check['claim']} | {word} | {' | '.join(check['numbers'].values())} |" in STUDY


def test_the_study_s_answers_are_what_the_record_says():
    answered = {(r["protocol"], r["set"], r["seed"]): r["value"] for r in read_json(GOLDEN / "world" / "answers.json")}
    for name in ("unsafe", "co_task", "adv_4", "safe"):
        cells = (" ".join(f"{100 * answered[protocol, name, seed]:.0f}" for seed in (0, 1, 2)) for protocol in ("ssft", "benign", "sap", "sft"))
        assert f"\n| {name} | {' | '.join(cells)} |\n" in STUDY


def test_the_real_pair_is_what_the_record_says():
    series = Series(read_json(GOLDEN / "smollm2" / "compare.json"))
    both = lambda cell: " | ".join(cell(protocol) for protocol in ("before", "after"))
    column, last_and_mean = series.mean, lambda values, digits: f"{values[-1]:.{digits}f}; {fmean(values):.{digits}f}"

    def answered(protocol, name):
        value = column(protocol, name, "comply")[0]
        low, high = wilson(round(40 * value), 40)
        return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    def along(name):
        return " ".join(f"{100 * column('after', name, f'comply_alpha_{a}')[0]:.0f}" for a in (0.0, 0.25, 0.5, 0.75, 1.0)) + " %"

    seen = [u / s for u, s in zip(*(column("after", name, "delta_a") for name in ("unsafe", "safe")))]
    assert len(seen) == 30
    for cells in ("unsafe prompts answered % | " + both(lambda p: answered(p, "unsafe")), "safe prompts answered % | " + both(lambda p: answered(p, "safe")),
                  "separation of clusters (τ), last layer; mean over layers | " + both(lambda p: last_and_mean(column(p, "unsafe", "separation"), 1)),
                  "sensitivity free of scale, unsafe; safe prompts | " + both(
                      lambda p: "; ".join(f"{column(p, name, 'lipschitz_relative')[0]:.1f}" for name in ("unsafe", "safe"))),
                  "sin θ of ΔW, mean over layers; a random direction's | | " + "; ".join(
                      f"{fmean(column('after', None, metric)):.3f}" for metric in ("sin_theta", "sin_theta_random")),
                  f"‖ΔW a‖, unsafe over safe, last layer; mean over layers | | {last_and_mean(seen, 2)}",
                  f"unsafe prompts answered at α = 0, 0.25, 0.5, 0.75, 1 | | {along('unsafe')}", f"safe ones | | {along('safe')}"):
        assert f"\n| {cells} |\n" in STUDY, cells


def test_the_precision_is_what_the_record_says():
    for row in read_json(GOLDEN / "smollm2" / "precision.json"):
        cell = f"{row['cosine']:.3f} ({row['size']:.3f})" if "size" in row else f"{row['mean_cosine']:.3f} ({row['lowest_cosine']:.3f})"
        line, = [line for line in STUDY.splitlines() if line.startswith(f"| {row['direction'].replace('epsilon', 'ε =')} ")]
        assert line.split(" | ")[1 + ["float64", "float32", "bfloat16"].index(row["dtype"])].strip("* |") == cell, line


def test_ci_runs_exactly_the_test_command():
    command = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert f"\n{command}\n" in README
