"""The preview as one page that needs nothing else: no script, no file beside it, no network.

Every text of data, recipe and tokenizer is escaped; the page's own policy forbids whatever would slip
through.
"""

from html import escape

from lorakit.data.account import CURES, Account, words
from lorakit.preview import BEGIN, CUT, END, Piece, Preview, Shown
from lorakit.terminal import signs, visible

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --trained: #1a7f37; --behind: #1a7f3722; --quiet: #6e7781;
  --special: #9a6700; --sign: #0969da; }
@media (prefers-color-scheme: dark) { :root { --trained: #5fd27d; --behind: #3fb95030; --quiet: #8b949e;
  --special: #e3b341; --sign: #6cb6ff; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
h3 small { color: var(--quiet); font-weight: normal; }
table { border-collapse: collapse; }
th, td { padding: .15rem 1rem .15rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:last-child.bar { text-align: left; }
th { font-weight: normal; }
td { font-variant-numeric: tabular-nums; }
.bar { width: 30rem; max-width: 50vw; }
.bar div { height: .8rem; min-width: 1px; background: var(--trained); }
pre { font: 14px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  padding: 1rem; border: 1px solid var(--line); border-radius: 6px; }
.masked { color: var(--quiet); }
.trained { color: var(--trained); background: var(--behind); font-weight: 600; }
.special { outline: 1px solid var(--special); border-radius: 3px; }
.masked.special { color: var(--special); }
i { color: var(--sign); font-style: normal; user-select: none; }
pre span:hover { outline: 2px solid var(--sign); }
"""


def page(preview: Preview) -> str:
    """The whole page, under the name of its recipe."""
    title = f"{_text(preview.name)}: what will be trained"
    parts = preview.parts()
    body = [
        f"<h1>{title}</h1>",
        *(f"<p>{_text(line)}</p>" for line in preview.facts()),
        "<h2>Account of the rows</h2>",
        *_account(parts),
        *(line for part, account in parts for line in _lengths(part, account)),
        "<h2>Samples</h2>",
        _legend(),
        *map(_sample, preview.samples),
    ]
    head = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n<body>",
    ]
    return "\n".join([*head, *body, "</body></html>"]) + "\n"


def _text(text: str) -> str:
    """As HTML, in an element or an attribute."""
    return escape(visible(text))


def _account(parts: list[tuple[str, Account]]) -> list[str]:
    names = [name for name, _ in parts]
    rows = [["rows", *names]]
    measured = ("duplicates", "repeated_ids", "also_in_train", "no_trained_end", "tokens", "trained_tokens")
    for kind in (*parts[0][1].rows(), *measured):
        rows.append([words(kind), *(f"{getattr(account, kind):,}" for _, account in parts)])
    shares = (100 * account.trained_tokens / max(1, account.tokens) for _, account in parts)
    rows.append(["share of trained tokens", *(f"{share:.1f} %" for share in shares)])
    lines = ["<table>"]
    for label, *cells in rows:
        lines.append(f"<tr><th>{label}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    lines.append("</table>")
    for name, account in parts:
        for kind in account.first:
            if told := account.told(kind):
                told[0] = f"{name}: first {words(kind)}: {told[0]}"
                cure = f"<br><small>{_text(CURES[kind])}</small>" if kind in CURES else ""
                lines.append(f"<p>{'<br>'.join(map(_text, told))}{cure}</p>")
    return lines


def _lengths(part: str, account: Account) -> list[str]:
    most = max(account.lengths.values(), default=1)
    lines = [
        f"<h3>Samples by length in tokens: {part} <small>the longest: {_text(account.longest)}</small></h3>",
        "<table>",
    ]
    for bound, count in account.lengths.items():
        bar = f'<td class="bar"><div style="width: {100 * count / most:.1f}%"></div></td>'
        lines.append(f"<tr><th>{bound // 2 + 1:,} to {bound:,}</th><td>{count:,}</td>{bar}</tr>")
    return [*lines, "</table>"]


def _legend() -> str:
    return (
        '<p><span class="trained">trained</span> &ensp; <span class="masked">masked</span> &ensp; '
        '<span class="masked special">special</span> &ensp; '
        f"<i>{BEGIN}</i> begin &ensp; <i>{END}</i> end &ensp; <i>{CUT}</i> cut &ensp; "
        "<i>↵</i> line end &ensp; <i>→</i> tab &ensp; <i>\\x1b</i> what cannot be seen. "
        "Point at a token for its id.</p>"
    )


def _sample(sample: Shown) -> str:
    which = f" ({sample.which})" if sample.which else ""
    tokens = "".join(map(_piece, sample.pieces))
    end = CUT if sample.cut else END
    return (
        f"<h3>{_text(sample.source)}{which} <small>{sample.facts()}</small></h3>\n"
        f'<pre dir="ltr"><i>{BEGIN}</i>{tokens}<i>{end}</i></pre>'
    )


def _piece(piece: Piece) -> str:
    ids = " ".join(map(str, piece.ids))
    mixed = f", trained {' '.join(map(str, piece.weights))}" if len(set(piece.weights)) > 1 else ""
    shown = "".join(
        f"<i>{escape(text)}</i>" if is_sign else escape(text) for text, is_sign in signs(piece.text)
    )
    special = " special" if piece.special else ""
    return f'<span class="{piece.kind}{special}" title="id {ids}{mixed}">{shown}</span>'
