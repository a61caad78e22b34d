"""Formats are known by excerpts of the models' own templates: the lines that hold their marks."""

import pytest

from baton.core.errors import StartupError
from baton_router.chat_output.detect import opens_reasoning, reasoning_format, tool_format
from baton_router.chat_output.formats import REASONING_FORMATS, TOOL_FORMATS

BAR = "\uff5c"
TEMPLATES = {
    "Qwen2.5": r"""
  {{- "\n</tools>\n\nReturn a json object within <tool_call></tool_call> XML tags:\n
  <tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}
  \n</tool_call><|im_end|>\n" }}
  {{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}""",
    "Qwen3": r"""
  {{- '<tool_call>\n{"name": "' }}
  {%- if '</think>' in content %}
  {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}""",
    "Qwen3-Coder": r"""
  {{- '\n\nReply in the following format:\n\n<tool_call>
  \n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>' }}""",
    "Hermes 2 Pro": r"""
  {{- "Return a json object with name and arguments within <tool_call></tool_call>
  XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-dict>}" }}""",
    "Llama 3.1": r"""
  {{- 'Respond with {"name": function name, "parameters": dictionary of argument name}.' }}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
  {{- "<|python_tag|>" + tool_call.name + ".call(" }}
  {{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}""",
    "Llama 3.2": r"""
  {{- 'Respond with {"name": function name, "parameters": dictionary of argument name}.' }}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}""",
    "Llama 4": r"""
  {{- '<|header_start|>assistant<|header_end|>\n\n' -}}{{- '<|python_start|>' }}
  {{- '{"name": "' + tool_call.function.name + '", ' }}{{- '"parameters": ' }}""",
    "Llama 4, vLLM's": r"""
  {{- "<|header_start|>system<|header_end|>\n\n" }}
  {{- "Use exact format: [func_name1(param1=value1, param2=value2), func_name2(...)]\n" }}""",
    "Llama 3.2, vLLM's": r"""
  {%- set system_message = "put it in the format of [func_name1(params_name1=params_value1)]" %}
  {{- "<|start_header_id|>system<|end_header_id|>\n\n" }}""",
    "Mistral v3": r"""{{- "[TOOL_CALLS] [" }}{%- set out = tool_call.function|tojson %}{{- out[:-1] }}""",
    "Mistral Nemo": r"""{{- "[TOOL_CALLS][" }}{{- ', "id": "' + tool_call.id + '"}' }}""",
    "Mistral v11": r"""{{- '[TOOL_CALLS]' + name + '[CALL_ID]' + tool_call.id + '[ARGS]' + arguments }}""",
    "Magistral": r"""
  {{- '[THINK]' + block['thinking'] + '[/THINK]' }}{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}""",
    "DeepSeek V3": f"""
  {{{{'<{BAR}Assistant{BAR}><{BAR}tool▁calls▁begin{BAR}><{BAR}tool▁call▁begin{BAR}>' + tool['type']
  + '<{BAR}tool▁sep{BAR}>' + tool['function']['name'] + '\\n' + '```json' + '\\n'}}}}""",
    "DeepSeek R1": f"""
  {{{{'<{BAR}tool▁call▁begin{BAR}>' + tool['type'] + '<{BAR}tool▁sep{BAR}>' + '\\n' + '```json' + '\\n'}}}}
  {{% if '</think>' in content %}}{{% set content = content.split('</think>')[-1] %}}{{% endif %}}
  {{{{'<{BAR}Assistant{BAR}><think>\\n'}}}}""",
    "DeepSeek V3.1": f"""
  {{{{'<{BAR}tool▁call▁begin{BAR}>'+ tool['function']['name'] + '<{BAR}tool▁sep{BAR}>'}}}}
  {{%- if not thinking -%}}{{{{'</think>'}}}}{{%- else -%}}{{{{'<think>'}}}}{{%- endif -%}}""",
    "GLM-4.5": r"""
  <tool_call>{function-name}
  <arg_key>{arg-key-1}</arg_key>
  <arg_value>{arg-value-1}</arg_value>
  {{ '\n<think>' + reasoning_content.strip() +  '</think>'}}""",
    "gpt-oss": r"""
  {{- "<|start|>assistant to=" }}{{- "functions." + tool_call.name + "<|channel|>commentary " }}
  {{- (tool_call.content_type if tool_call.content_type is defined else "json") + "<|message|>" }}""",
    "Granite 3.2": r"""
  Write down your thoughts after 'Here is my thought process:' and the answer after 'Here is my response:'""",
    "Seed-OSS": r"""{{ "<seed:tool_call>\n<function=" + f + "<parameter=" }}<seed:think>""",
    "plain": "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}",
    "Phi": "{{ '<|' + message['role'] + '|>' }}{% if tools %}<|tool|>{{ tools }}<|/tool|>{% endif %}",
}
FOUND = {
    "Qwen2.5": ("hermes", None),
    "Qwen3": ("hermes", "qwen3"),
    "Qwen3-Coder": ("qwen3_coder", None),
    "Hermes 2 Pro": ("hermes", None),
    "Llama 3.1": ("llama3_json", None),
    "Llama 3.2": ("llama3_json", None),
    "Llama 4": ("llama4_json", None),
    "Llama 4, vLLM's": ("llama4_pythonic", None),
    "Llama 3.2, vLLM's": ("pythonic", None),
    "Mistral v3": ("mistral_v3", None),
    "Mistral Nemo": ("mistral_v3", None),
    "Mistral v11": ("mistral", None),
    "Magistral": ("mistral", "mistral"),
    "DeepSeek V3": ("deepseek_v3", None),
    "DeepSeek R1": ("deepseek_v3", "deepseek_r1"),
    "DeepSeek V3.1": ("deepseek_v31", "deepseek_r1"),
    "GLM-4.5": ("glm4", "glm45"),
    "gpt-oss": ("harmony", "harmony"),
    "Granite 3.2": (None, "granite"),
    "Seed-OSS": (None, "seed_oss"),
    "plain": (None, None),
    "Phi": (None, None),
}


@pytest.mark.parametrize("model", TEMPLATES)
def test_formats_of_models(model: str):
    tools, reasoning = FOUND[model]
    assert tool_format("auto", TEMPLATES[model]) is (TOOL_FORMATS[tools] if tools else None)
    assert reasoning_format("auto", TEMPLATES[model]) is (REASONING_FORMATS[reasoning] if reasoning else None)


def test_a_model_type_says_enough():
    assert tool_format("auto", None, "gpt_oss") is TOOL_FORMATS["harmony"]
    assert reasoning_format("auto", None, "gpt_oss") is REASONING_FORMATS["harmony"]
    assert tool_format("auto", None, "llama") is None


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_a_name_holds_whatever_the_template_says(name: str):
    assert tool_format(name, TEMPLATES["plain"]) is TOOL_FORMATS[name]
    assert tool_format("none", TEMPLATES["Qwen3"]) is None


@pytest.mark.parametrize("name", sorted(REASONING_FORMATS))
def test_a_name_of_thinking_holds_too(name: str):
    assert reasoning_format(name, TEMPLATES["plain"]) is REASONING_FORMATS[name]
    assert reasoning_format("none", TEMPLATES["Qwen3"]) is None


def test_one_name_for_both_of_mistrals():
    assert tool_format("mistral", TEMPLATES["Mistral v3"]) is TOOL_FORMATS["mistral_v3"]
    assert tool_format("mistral", TEMPLATES["Mistral v11"]) is TOOL_FORMATS["mistral"]


def test_unknown_names_are_refused():
    with pytest.raises(StartupError, match="hermes"):
        tool_format("hermess", None)
    with pytest.raises(StartupError, match="qwen3"):
        reasoning_format("qwen4", None)


@pytest.mark.parametrize(
    ("prompt", "name", "is_open"),
    [
        ("<|im_start|>assistant\n<think>\n", "qwen3", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "qwen3", False),
        ("<|im_start|>assistant\n", "qwen3", False),
        ("<think>", "mistral", False),
        ("<|start|>assistant", "harmony", False),
    ],
)
def test_prompts_that_open_thinking(prompt: str, name: str, is_open: bool):
    assert opens_reasoning(prompt, REASONING_FORMATS[name]) is is_open
    assert opens_reasoning(prompt, None) is False
