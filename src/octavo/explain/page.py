"""The page of a component, in English and in Chinese, and the index of all pages."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

from octavo.explain import facts
from octavo.files import write_atomic
from octavo.laws.components import Component, components
from octavo.laws.examine import HEADINGS, Verdict, cells
from octavo.laws.parity import Parity, recorded

Lang = Literal["en", "zh"]
LANGS: tuple[Lang, ...] = ("en", "zh")
SUFFIX: dict[Lang, str] = {"en": ".md", "zh": ".zh-CN.md"}
PROSE_LINES = 15

WORDS: dict[Lang, dict[str, str]] = {
    "en": {
        "formula": "Formula", "shapes": "Shapes", "cost": "Cost", "settings": "Settings", "proof": "Proof",
        "values": "Values", "waves": "Wavelengths",
        "shapes of": "A real pass of {rows} rows of {tokens} tokens, d_model {d_model}, {n_heads} heads; the state is "
        "that of a row of {counted:,} tokens in float32.",
        "cost of": "One layer at d_model {d_model}, {n_heads} heads, a row of {counted:,} tokens, float32.",
        "waves of": "In tokens, a head of 64 channels, theta 10000, the settings {settings}.",
        "nothing": "No weights and no products of its own.",
        "no settings": "None.",
        "asked": "Laws asked of it", "not asked": "Not promised, so not asked",
        "no parity": "No independent implementation is recorded: it keeps the laws.",
        "parity": "Largest difference from an independent implementation, relative to max(1, its largest value):",
        "code": "Code", "tests": "Tests",
        "other": "[中文]({name}.zh-CN.md)", "all": "[all components](../components.md)",
    },
    "zh": {
        "formula": "公式", "shapes": "形状", "cost": "开销", "settings": "设置", "proof": "证明",
        "values": "取值", "waves": "波长",
        "shapes of": "一次真实的前向计算：{rows} 行、每行 {tokens} 个词元，d_model {d_model}，{n_heads} 个头；"
        "状态按一行 {counted:,} 个词元、float32 计。",
        "cost of": "一层，d_model {d_model}，{n_heads} 个头，一行 {counted:,} 个词元，float32。",
        "waves of": "以词元计；头宽 64，theta 10000，设置 {settings}。",
        "nothing": "没有自己的权重，也没有矩阵乘法。",
        "no settings": "无。",
        "asked": "须遵守的定律", "not asked": "未作承诺、因此不检查",
        "no parity": "没有记录到独立实现的对照：只遵守定律。",
        "parity": "与独立实现的最大差异，相对于 max(1, 对方的最大值)：",
        "code": "代码", "tests": "测试", "other": "[English]({name}.md)", "all": "[全部组件](../components.md)",
    },
}  # fmt: skip
COLUMNS: dict[Lang, dict[str, tuple[str, ...]]] = {
    "en": {
        "shapes": ("name", "shape", "what it is"), "cost": ("figure", "value"),
        "settings": ("setting", "may be", "default", "meaning"),
        "parity": ("reference", "cases", "fp32", "bf16", "fp64"), "waves": ("pair", "plain", "scaled"),
    },
    "zh": {
        "shapes": ("名称", "形状", "含义"), "cost": ("项目", "数值"),
        "settings": ("设置", "可取值", "默认", "说明"),
        "parity": ("参照实现", "用例数", "fp32", "bf16", "fp64"), "waves": ("对", "原波长", "缩放后"),
    },
}  # fmt: skip
# What the generated tables say, in Chinese; what is not here (names, settings, docstrings) stays as it is in the code.
IN_CHINESE = {
    "input": "输入", "output": "输出", "rotation": "旋转", "added to scores": "加到分数上", "own": "自有参数",
    "state, token": "状态，每词元一份", "state, ring": "状态，环形窗口", "state, row": "状态，每行一份",
    "state, memory": "状态，写入一次", "bytes": "字节",
    "parameters": "参数", "FLOPs of a row": "一行的 FLOPs", "FLOPs of the next token": "下一个词元的 FLOPs",
    "state bytes of a row": "一行的状态字节", "state bytes of a row twice as long": "两倍长的一行的状态字节",
    "required": "必填", "never turns": "不转动",
}  # fmt: skip
LAW_TESTS = {"mixer": "tests/laws/test_models.py", "channel": "tests/laws/test_models.py"}


def page_name(component: Component) -> str:
    """Activations share a page; every other component has its own."""
    return "activation" if "activation" in component.tables else component.name


def pages() -> dict[str, Component]:
    """Every page by name, with the component (for activations: one of them) it is about."""
    found: dict[str, Component] = {}
    for component in components():
        found.setdefault(page_name(component), component)
    return found


def prose(name: str, lang: Lang) -> str:
    """What is written by hand; empty where nothing is."""
    path = resources.files("octavo.explain") / lang / f"{name}.md"
    return path.read_text("utf-8").strip() if path.is_file() else ""


def formula(component: Component) -> str:
    """The class docstring, its code in single backticks."""
    return (inspect.getdoc(component.cls) or "").replace("``", "`")


def one_line(component: Component) -> str:
    """The beginning of its docstring."""
    return textwrap.shorten(formula(component).partition("\n\n")[0], 100, placeholder=" ...")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], lang: Lang = "en") -> str:
    shown = ([_cell(cell, lang) for cell in row] for row in rows)
    lines = [heads, ["---"] * len(heads), *shown]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str, lang: Lang) -> str:
    if lang == "zh":
        kind, colon, rest = text.partition(": ")
        if text in IN_CHINESE:
            text = IN_CHINESE[text]
        elif colon and kind in IN_CHINESE:
            text = f"{IN_CHINESE[kind]}：{rest.replace('bytes', IN_CHINESE['bytes'])}"
    return text.replace("|", "\\|").replace("\n", " ")


def page(component: Component, lang: Lang = "en", root: str | None = None) -> str:
    """The page of ``component``.

    Args:
        root: the way from the page to the project, for links; None: paths stand as they are.
    """
    words, columns, name = WORDS[lang], COLUMNS[lang], page_name(component)
    parity = records_of(component)
    is_activation = "activation" in component.tables
    title = component.title + ("" if is_activation else f", `kind: {component.kind}`")
    if root is not None:
        title = " · ".join([title, words["other"].format(name=name), words["all"]])
    parts = [f"# {name}", title, prose(name, lang)]
    if is_activation:
        points, *values = facts.activation_values()
        parts += [f"## {words['values']}", table(points, values)]
    else:
        parts += [f"## {words['formula']}", formula(component)]
        parts += [
            f"## {words['shapes']}",
            _said(words["shapes of"], facts.SHOWN),
            table(columns["shapes"], facts.shapes(component), lang),
        ]
        if "scaling" in component.tables:
            used = {
                k: v for k, v in component.settings(facts.COUNTED).items() if k != "kind" and not isinstance(v, list)
            }
            said = ", ".join(f"{k} {v}" for k, v in used.items()) or "-"
            parts += [f"## {words['waves']}", words["waves of"].format(settings=said),
                      table(columns["waves"], facts.frequencies(component), lang)]  # fmt: skip
        if costs := facts.costs(component):
            parts += [
                f"## {words['cost']}",
                _said(words["cost of"], facts.COUNTED),
                table(columns["cost"], costs, lang),
            ]
        else:
            parts += [f"## {words['cost']}", words["nothing"]]
        rows = facts.settings(component.cls.Config)
        parts += [f"## {words['settings']}", table(columns["settings"], rows, lang) if rows else words["no settings"]]
    parts += [f"## {words['proof']}", _proof(component, parity, lang, root)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _said(words: str, size: facts.Size) -> str:
    return words.format(
        rows=facts.ROWS, tokens=facts.TOKENS, counted=facts.COUNTED_TOKENS, d_model=size.d_model, n_heads=size.n_heads
    )


def records_of(component: Component) -> list[Parity]:
    """The recorded parity of all that shares its page."""
    kinds = [c.kind for c in components() if page_name(c) == page_name(component)] if not component.own else []
    records = recorded()
    return [one for kind in kinds or [component.kind] for one in records.get(kind, ())]


def _proof(component: Component, parity: Sequence[Parity], lang: Lang, root: str | None) -> str:
    words = WORDS[lang]
    asked, not_asked = facts.promises(component)
    parts = [f"{words['asked']} ({len(asked)}): {', '.join(asked)}."]
    if not_asked:
        parts.append(f"{words['not asked']}: {', '.join(not_asked)}.")
    if parity:
        parts += [words["parity"], table(COLUMNS[lang]["parity"], facts.parity_rows(parity))]
    else:
        parts.append(words["no parity"])
    tests = [] if component.own else [LAW_TESTS.get(component.tables[0], "tests/laws/test_component_laws.py")]
    tests += sorted({test for one in parity for test in one.tests})
    link = lambda path: path if root is None or Path(path).is_absolute() else f"[{path}]({root}{path})"  # noqa: E731
    parts.append(f"{words['code']}: {link(facts.source(component))}")
    if tests:
        parts.append(f"{words['tests']}: {', '.join(map(link, tests))}")
    return "\n\n".join(parts)


# --------------------------------------------------------------------------------------------- all of them

MARKS = ("<!-- verify -->", "<!-- /verify -->")
INDEX = """# Components

What a `kind` in a recipe can be, with its proof. `octavo explain NAME` prints a page, `octavo verify NAME` runs the
laws.

Laws are properties that hold for any component of its sort: no output depends on a later token, packed documents do not
mix, prefill and decoding in any cut equal one pass, every gradient is the derivative of the loss, and so on. Each is
asked in several small models, in float64. Errors are the largest difference from the reference, relative to max(1, its
largest value). *proven*: all laws, and agreement with an independent implementation; *keeps the laws*: nobody else's
numbers are recorded; *unproven*: a law is broken. The law of compilation runs with `--slow` and is not in this count.

Where a page says what the notes got wrong: they are the Chinese study notes whose techniques this project implements.

Written by `octavo explain --write docs/components`; the seconds are those of the machine that wrote it.

{begin}
{table}
{end}
"""


def index(verdicts: Sequence[Verdict], folder: str) -> str:
    """The page that lists all components, with the table of ``octavo verify``."""
    rows = []
    for verdict in verdicts:
        name, *rest = cells(verdict)
        path = f"{folder}/{page_name(verdict.component)}"
        links = f"[{name}]({path}{SUFFIX['en']}) [中文]({path}{SUFFIX['zh']})"
        rows.append([links, *rest, verdict.standing])
    return INDEX.format(begin=MARKS[0], end=MARKS[1], table=table([*HEADINGS, "standing"], rows))


def all_pages() -> Mapping[str, str]:
    """File name -> text of every page in both languages."""
    return {
        f"{name}{SUFFIX[lang]}": page(component, lang, root="../../")
        for name, component in pages().items()
        for lang in LANGS
    }


def write(folder: Path, verdicts: Sequence[Verdict]) -> int:
    """Write every page into ``folder`` and the index beside it; pages of components that are gone go. The number."""
    folder.mkdir(parents=True, exist_ok=True)
    found = all_pages()
    for old in folder.glob("*.md"):
        if old.name not in found:
            old.unlink()
    for name, text in found.items():
        write_atomic(folder / name, text)
    write_atomic(folder.with_suffix(".md"), index(verdicts, folder.name))
    return len(found)
