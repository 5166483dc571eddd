"""The style sheet of the HTML report: light, dark and paper, from a phone's width upwards."""

from __future__ import annotations

from typing import Final

_LIGHT: Final = """
  --surface: #ffffff; --raised: #f6f7f9; --ink: #16191d; --muted: #59626e; --line: #d9dee5;
  --accent: #1f6feb; --second: #0f8a7e; --other: #b3bcc8; --good: #1a7f37; --bad: #c4242b;
  --good-soft: #e7f5ea; --bad-soft: #fdebec; --mark: #ffe9b8;
  --shade0: #eef4ff; --shade1: #d6e5ff; --shade2: #b3cfff; --shade3: #8ab4fb; --shade4: #5b92ef;
  --shade5: #3570d4; --shade6: #1f4fa8; --on-low: #10233f; --on-middle: #10233f; --on-high: #ffffff;
"""

_DARK: Final = """
  --surface: #0f1318; --raised: #181d24; --ink: #e8ebef; --muted: #9aa5b1; --line: #2c343e;
  --accent: #5b9bff; --second: #2fb5a6; --other: #76828f; --good: #4cc267; --bad: #ff7178;
  --good-soft: #12301b; --bad-soft: #3a171a; --mark: #5c4708;
  --shade0: #16233a; --shade1: #1b315a; --shade2: #21427c; --shade3: #2a57a4; --shade4: #4377cc;
  --shade5: #76a3ea; --shade6: #b4d0ff; --on-low: #dfe9fb; --on-middle: #ffffff; --on-high: #0b1626;
"""

STYLE: Final = f"""
:root {{{_LIGHT}
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  color-scheme: light dark;
}}
@media (prefers-color-scheme: dark) {{ :root {{{_DARK}}} }}
@media print {{ :root {{{_LIGHT}  color-scheme: light; }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{ margin: 0; background: var(--surface); color: var(--ink); font: 15px/1.5 var(--font); }}
header, main, footer {{ max-width: 1120px; margin: 0 auto; padding: 0 20px; }}
header {{ padding-top: 28px; }}
h1 {{ margin: 0; font-size: 30px; line-height: 1.2; overflow-wrap: anywhere; letter-spacing: -0.01em; }}
h2 {{ margin: 0 0 12px; font-size: 20px; line-height: 1.3; }}
h4 {{ margin: 0 0 4px; font-size: 12px; font-weight: 600; color: var(--muted); }}
p {{ margin: 0 0 10px; }}
code {{ font: 0.92em var(--mono); }}
.kicker {{ margin: 0 0 2px; color: var(--muted); font-size: 13px; }}
.sub {{ color: var(--muted); overflow-wrap: anywhere; margin: 4px 0 14px; }}
.chip {{ border: 1px solid var(--line); border-radius: 20px; padding: 1px 9px; font-size: 12.5px; }}
.verdict {{ border-left: 4px solid; border-radius: 4px; padding: 10px 14px; overflow-wrap: anywhere; }}
.passed .verdict {{ border-color: var(--good); background: var(--good-soft); }}
.failed .verdict {{ border-color: var(--bad); background: var(--bad-soft); }}
.badge {{ margin-right: 6px; letter-spacing: 0.03em; }}
.passed .badge, .passed .state {{ color: var(--good); }}
.failed .badge, .failed .state {{ color: var(--bad); }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(185px, 1fr)); gap: 10px; margin: 14px 0 0; }}
.tiles div {{ background: var(--raised); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }}
.tiles dt {{ color: var(--muted); font-size: 13px; }}
.tiles dd {{ margin: 0; font-size: 20px; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }}
.tiles data {{ white-space: nowrap; }}
small {{ display: block; font-size: 12px; font-weight: 400; color: var(--muted); line-height: 1.35; }}
section {{ margin-top: 30px; padding-top: 24px; border-top: 1px solid var(--line); }}
.columns {{ display: grid; gap: 24px; grid-template-columns: minmax(0, 1fr); align-items: start; margin-bottom: 14px; }}
@media (min-width: 900px) {{ .columns {{ grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }} }}
.note {{ color: var(--muted); font-size: 13px; }}
.notes {{ margin: 0 0 10px; padding-left: 18px; color: var(--muted); font-size: 13.5px; overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; margin-bottom: 12px; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 5px 10px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }}
th:last-child, td:last-child {{ padding-right: 0; }}
thead th {{ color: var(--muted); font-weight: 500; font-size: 12.5px; vertical-align: bottom; }}
thead th small {{ font-size: 11px; min-width: 84px; }}
tbody th {{ font-weight: 500; }}
.number {{ text-align: right; }}
td.number {{ white-space: nowrap; }}
thead span.number {{ display: block; }}
.gate table {{ max-width: 760px; }}
.gate td.number {{ padding-right: 28px; }}
.gate thead .number {{ padding-right: 18px; }}
.wide {{ font-size: 12.5px; }}
.wide tbody th:first-child {{ min-width: 110px; }}
.ours th, .ours td {{ font-weight: 650; }}
.facts {{ margin: 0 0 12px; font-size: 14px; }}
.facts div {{ display: grid; grid-template-columns: 150px minmax(0, 1fr); gap: 12px; padding: 4px 0; }}
.facts dt {{ color: var(--muted); }}
.facts dd {{ margin: 0; overflow-wrap: anywhere; }}
.digest {{ color: var(--muted); font-size: 12px; }}
figure {{ margin: 0; min-width: 0; }}
figcaption {{ color: var(--muted); font-size: 13px; margin-top: 6px; }}
.plot svg {{ display: block; width: 100%; max-width: 540px; height: auto; overflow: visible; }}
.plot svg * {{ stroke-linejoin: round; }}
.map figcaption {{ margin: 0 0 6px; }}
.map figcaption strong {{ color: var(--ink); }}
.map table {{ table-layout: fixed; border-collapse: separate; border-spacing: 2px; font-size: 11.5px; }}
.map th, .map td {{ padding: 2px 0; border: 0; text-align: center; overflow: hidden; vertical-align: middle; }}
.map tr > :first-child {{ width: 26px; color: var(--muted); font-size: 11px; }}
.map thead th {{ font-size: 10.5px; overflow-wrap: anywhere; line-height: 1.15; vertical-align: bottom; }}
.map td {{ border-radius: 3px; color: var(--on-low); }}
[data-shade="0"] {{ background: var(--shade0); }} [data-shade="1"] {{ background: var(--shade1); }}
[data-shade="2"] {{ background: var(--shade2); }} [data-shade="3"] {{ background: var(--shade3); }}
[data-shade="4"] {{ background: var(--shade4); }} [data-shade="5"] {{ background: var(--shade5); }}
[data-shade="6"] {{ background: var(--shade6); }}
.map [data-shade="3"], .map [data-shade="4"] {{ color: var(--on-middle); }}
.map [data-shade="5"], .map [data-shade="6"] {{ color: var(--on-high); }}
.plain {{ text-decoration: underline; text-underline-offset: 2px; }}
details {{ margin: 0 0 10px; border: 1px solid var(--line); border-radius: 8px; padding: 0 14px; }}
details[open] {{ padding-bottom: 6px; }}
summary {{ cursor: pointer; padding: 8px 0; font-weight: 500; }}
.text {{ border: 1px solid var(--line); border-radius: 8px; margin-bottom: 12px; overflow: hidden; }}
.prompt {{ margin: 0; padding: 10px 14px; background: var(--raised); font: 13px/1.5 var(--mono); white-space: pre-wrap;
  overflow-wrap: anywhere; }}
.prompt span {{ display: block; font: 600 12px var(--font); color: var(--muted); }}
.voices {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 0; }}
.voice {{ padding: 10px 14px; border-top: 1px solid var(--line); }}
.voice p {{ margin: 0; font: 13px/1.5 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; }}
.voice em {{ font: italic 12px var(--font); color: var(--muted); }}
mark {{ background: var(--mark); color: inherit; border-radius: 2px; }}
footer {{ margin-top: 30px; padding-bottom: 30px; color: var(--muted); font-size: 13px; }}
@media (max-width: 560px) {{
  header, main, footer {{ padding-left: 14px; padding-right: 14px; }}
  h1 {{ font-size: 24px; }}
  .tiles {{ grid-template-columns: 1fr 1fr; gap: 8px; }}
  .tiles div {{ padding: 8px 10px; }}
  .tiles div:first-child {{ grid-column: 1 / -1; }}
  .tiles dd {{ font-size: 15px; }}
  .gate td.number, .gate thead .number {{ padding-right: 8px; }}
  .gate table {{ font-size: 12.5px; }}
  .gate code {{ overflow-wrap: anywhere; }}
  .gate td.number {{ white-space: normal; }}
  .facts div {{ grid-template-columns: minmax(0, 1fr); gap: 0; }}
  .facts dt {{ font-size: 12.5px; }}
  .wide tbody th:first-child {{ position: sticky; left: 0; background: var(--surface); }}
  .map table {{ font-size: 10.5px; border-spacing: 1px; }}
  .map thead th {{ font-size: 9.5px; }}
}}
@media print {{
  @page {{ margin: 14mm; }}
  body {{ font-size: 11px; print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
  header, main, footer {{ max-width: none; padding: 0; }}
  section {{ margin-top: 14px; padding-top: 12px; }}
  h2 {{ break-after: avoid; font-size: 15px; }}
  .note, .notes, .facts, figcaption {{ font-size: 10px; }}
  .prompt, .voice p {{ font-size: 10px; }}
  small, .kicker, .digest, .chip, summary {{ font-size: 9px; }}
  table, .wide {{ font-size: 9.5px; }}
  thead th small {{ min-width: 0; font-size: 8.5px; }}
  td.number {{ white-space: normal; }}
  th, td {{ padding: 2px 6px 2px 0; }}
  tr, figure, .tiles div {{ break-inside: avoid; }}
  thead {{ display: table-header-group; }}
  .map {{ break-inside: auto; }}
  .scroll {{ overflow: visible; }}
  .columns {{ grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 14px; }}
  details {{ border: 0; padding: 0; }}
  details::details-content {{ content-visibility: visible; height: auto; }}
  .tiles {{ grid-template-columns: repeat(5, 1fr); }}
  .tiles dd {{ font-size: 13px; }}
  .tiles data {{ white-space: normal; }}
}}
"""
