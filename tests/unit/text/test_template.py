"""The template's sandbox and limits, and what templates in use need of it."""

import json
from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from text import AssetError, ChatTemplate, PromptTooLong, TemplateFailed

MESSAGES = [("user", "hi <b>&</b> 'you' ü"), ("assistant", "hello"), ("user", "bye")]


def render(source: str, **options: Any) -> str:
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate(source, file="chat_template.jinja", variables=variables, **options).render(
        MESSAGES
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__closure__[0] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self._TemplateReference__context['range'].__self__ }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '%s'|format(''.__class__.mro()) }}",
        "{{ dict.mro() }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ lipsum() }}",
        "{% include 'other' %}",
        "{% import 'os' as os %}{{ os }}",
    ],
)
def test_escapes_from_the_sandbox_are_refused(source: str) -> None:
    try:
        text = render(source)
    except TemplateFailed:
        return
    assert text.strip("<>\n ") == ""  # undefined renders as nothing


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**12) %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**12 }}",
        "{{ 10**12 * ['a'] }}",
        "{{ 9 ** 999999 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_work_without_end_is_refused(source: str) -> None:
    with pytest.raises((TemplateFailed, AssetError)):
        render(source)


def test_output_beyond_the_limit_is_refused() -> None:
    source = "{% for i in range(1000) %}0123456789{% endfor %}"
    assert len(render(source, max_chars=10_000)) == 10_000
    with pytest.raises(PromptTooLong, match="more than 9999 characters"):
        render(source, max_chars=9_999)


def test_each_rendering_has_its_own_budget() -> None:
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}ok", file="f", variables={})
    assert [template.render([]) for _ in range(12)] == ["ok"] * 12


@pytest.mark.parametrize("source", ["{% if %}", "{{ nothing|nofilter }}", "{% endfor %}"])
def test_invalid_template_is_named_at_load(source: str) -> None:
    with pytest.raises(AssetError, match=r"^chat_template\.jinja: the chat template is not valid"):
        render(source)


def test_failure_names_its_kind() -> None:
    with pytest.raises(TemplateFailed, match="UndefinedError"):
        render("{{ messages[7].role.name }}")


def test_time_is_the_clocks() -> None:
    clock = datetime(2031, 5, 4)
    assert render("{{ strftime_now('%d %b %Y') }}", now=lambda: clock) == "04 May 2031"


@pytest.mark.parametrize(
    "source",
    [
        (
            "{{ bos_token }}{% for m in messages %}\n  {% if loop.index0 == 1 %}\n"
            "    {% continue %}\n  {% endif %}\n"
            "{{ m.role | upper }}: {{ m['content'] | trim }}\n{% endfor %}"
        ),
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
        "{{ {'b': 1, 'a': '<&>ü'} | tojson(ensure_ascii=true, sort_keys=true) }}",
        (
            "{%- set ns = namespace(last=0, self='x') -%}{%- for m in messages -%}"
            "{%- set ns.last = loop.index -%}{%- endfor -%}{{ ns.last }}{{ ns.self }}"
        ),
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% if tools is none and not documents %}{{ dict(a=1, **{'b': 2}) }}{% endif %}",
        (
            "{% for m in messages[::-1] %}{{ m.content.split(' ')[0] }}{% if loop.last %}"
            "{% break %}{% endif %}{% endfor %}{{ eos_token }}"
        ),
        "{% if tools %}x{% endif %}{{ missing }}{{ missing is defined }}{{ 'ab' * 3 }}{{ 2 ** 5 }}",
        "{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m('a') ~ m('b') }}{{ range(3) | list }}",
        "line\n",
    ],
)
def test_templates_render_as_transformers_renders_them(source: str) -> None:
    chat = [{"role": role, "content": content} for role, content in MESSAGES]
    rendered: list[str] = render_jinja_template(  # type: ignore[assignment]
        [chat],
        chat_template=source,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
        tools=None,
        documents=None,
    )[0]
    assert [render(source)] == rendered


def test_json_keeps_text_as_models_saw_it() -> None:
    assert json.loads(render("{{ messages[0].content | tojson }}")) == MESSAGES[0][1]
    assert "<b>&</b> 'you' ü" in render("{{ messages[0].content | tojson }}")
