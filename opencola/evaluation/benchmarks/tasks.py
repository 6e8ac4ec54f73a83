"""The eight benchmarks as data: questions from JSONL files, and the prompts made of them (evaluation.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opencola.checkpoints.files import read_json
from opencola.errors import UserError
from opencola.evaluation.benchmarks.grading import Grade, Rule, grade, map_choice
from opencola.text.lines import read_objects

DEMONSTRATIONS = Path(__file__).parent / "demonstrations.json"
"""The project's own, written for it."""


@dataclass(frozen=True)
class Question:
    """One question of a task."""

    id: str | int
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    context: str = ""
    answer_index: int | None = None
    """Which option is right, where the file says so."""
    prompt: str | None = None
    """A ready prompt, used as it is; then `question` may be empty."""
    few_shot_prefix: str = ""
    """What a ready prompt is to follow, as it is."""


@dataclass(frozen=True)
class Task:
    """How a benchmark is asked and graded."""

    name: str
    """Its records are in NAME.jsonl."""
    title: str
    rule: Rule
    shots: int
    options: int
    """How many a question has; 0: none."""
    lead: str
    """The label of a question's first line."""
    anchor: str
    """The prompt's last characters; "": the question is all."""
    instruction: str = ""
    """The whole prompt's first line, followed by a blank one; "": none."""
    heading: str = ""
    """The line before the options; "": none."""
    has_context: bool = False
    """The lead's text is the record's context, and its question follows on a line of its own."""

    @property
    def chance(self) -> float:
        """Accuracy, a fraction of 1, of picking an option blindly; 0 without options."""
        return 1 / self.options if self.options else 0.0

    def prompt(self, record: Question, demonstrations: Sequence[Question]) -> str:
        """What a model is to continue: a ready prompt as it is, else instruction, shots and the question.

        It ends in the anchor, without a space or a newline. Raises UserError unless there are `shots` demonstrations.
        """
        if record.prompt is not None:
            return record.few_shot_prefix + record.prompt
        if len(demonstrations) != self.shots:
            raise UserError(f"{self.name} takes {self.shots} demonstrations, not {len(demonstrations)}")
        shots = [f"{self.ask(shot)} {shot.answer}" for shot in demonstrations]
        return "\n\n".join([*filter(None, [self.instruction]), *shots, self.ask(record)])

    def ask(self, record: Question) -> str:
        """A single question, from its lead to its anchor."""
        if not self.anchor:
            return record.question.rstrip()
        lines = [f"{self.lead}: {record.context if self.has_context else record.question}"]
        if self.has_context:
            lines.append(f"Question: {record.question}")
        if self.heading:
            lines.append(self.heading)
        lines += [f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(record.choices)]
        return "\n".join([*lines, self.anchor])

    def grade(self, record: Question, generation: str) -> Grade:
        """The grade of a raw generation."""
        return grade(self.rule, generation, record.answer, record.choices)


READ = "Read the article and choose the option that answers the question or completes the sentence."

TASKS: tuple[Task, ...] = (
    Task("lambada", "LAMBADA", "first_word", 0, 0, lead="", anchor=""),
    Task("mmlu", "MMLU", "option", 2, 4, "Question", "Answer:"),
    Task("obqa", "OBQA", "option", 2, 4, "Question", "Answer:"),
    Task("hellaswag", "HellaSwag", "exact", 2, 4, "Context", "Answer:"),
    Task("race", "RACE", "option", 2, 4, "Article", "Answer:", instruction=READ, heading="Options:"),
    Task("siqa", "SIQA", "option", 2, 3, "Question", "Answer:"),
    Task("squad", "SQuAD", "exact", 1, 0, "Context", "Answer:", has_context=True),
    Task("story_cloze", "Story Cloze", "exact", 2, 2, "Story", "End:"),
)
"""In the order of the protocol's table."""


def find_task(name: str) -> Task:
    """The task of a name. Raises UserError for an unknown one."""
    for task in TASKS:
        if task.name == name:
            return task
    raise UserError(f"unknown task {name!r}: choose one of {', '.join(task.name for task in TASKS)}")


def read_questions(folder: Path, task: Task) -> list[Question]:
    """A task's questions from FOLDER/NAME.jsonl, one JSON object a line; blank lines are skipped.

    Raises FileNotFoundError where there is no such file, and UserError, naming file, line and field, for a record that
    is not as the task needs it, for an id that came before, and for a file without records.
    """
    file = folder / f"{task.name}.jsonl"
    questions: dict[str | int, Question] = {}
    places: dict[str | int, str] = {}
    for place, row in read_objects(file):
        question = parse_question(row, task, place)
        check_answer(question, place)
        if question.id in questions:
            first = places[question.id].removeprefix(f"{file}, ")
            raise UserError(f"{place}: field 'id': {question.id!r} is the id of {first}, too")
        questions[question.id], places[question.id] = question, place
    if not questions:
        raise UserError(f"{file}: no records")
    return list(questions.values())


def read_demonstrations(file: Path = DEMONSTRATIONS) -> dict[str, tuple[Question, ...]]:
    """Demonstrations by task from a JSON file: an object of lists of records (an id is not needed), in prompt order.

    A file may leave out tasks. Raises UserError, naming file, task, number and field, for an unknown task, for another
    number of demonstrations than the task's shots, and for a record that is not as the task needs it.
    """
    demonstrations = {}
    for name, shots in read_json(file).items():
        try:
            task = find_task(name)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from error
        if not isinstance(shots, list) or len(shots) != task.shots:
            raise UserError(f"{file}: {name} takes a list of {task.shots} demonstrations")
        numbered = [(f"{file}, {name} {i}", shot) for i, shot in enumerate(shots, 1)]
        for place, shot in numbered:
            if isinstance(shot, dict) and "prompt" in shot:
                raise UserError(f"{place}: field 'prompt': a demonstration has none")
        demonstrations[name] = tuple(
            parse_question({"id": i, **shot} if isinstance(shot, dict) else shot, task, place)
            for i, (place, shot) in enumerate(numbered)
        )
        for (place, _), shot in zip(numbered, demonstrations[name], strict=True):
            check_answer(shot, place)
    return demonstrations


def check_answer(question: Question, place: str) -> None:
    """Raise UserError where the right answer is none of the options, by the rules that map what a model writes to one:
    no answer could then be right."""
    if question.choices and map_choice(question.answer, question.choices) is None:
        raise UserError(f"{place}: field 'answer' of {question.id!r} is {question.answer!r}, none of its options")


def parse_question(row: Any, task: Task, place: str) -> Question:
    """A record of what JSON holds; `place` begins the messages. Raises UserError naming the field that is wrong."""
    if not isinstance(row, Mapping):
        raise UserError(f"{place}: not an object")

    def text(field: str, needed: bool) -> str:
        value = row.get(field)
        if value is None and not needed:
            return ""
        if not isinstance(value, str) or (needed and not value.strip()):
            raise UserError(f"{place}: field {field!r} is {value!r}, not a text" + " with something in it" * needed)
        return value

    name = row.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise UserError(f"{place}: field 'id' is {name!r}, not a text or a whole number")
    ready = row.get("prompt") is not None
    if row.get("few_shot_prefix") is not None and not ready:
        raise UserError(f"{place}: field 'few_shot_prefix' goes with a 'prompt', which is missing")
    choices = row.get("choices") if row.get("choices") is not None else []
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"{place}: field 'choices' is {choices!r}, not a list of texts")
    if len(choices) != task.options:
        raise UserError(f"{place}: field 'choices' has {len(choices)} options; {task.name} has {task.options}")
    index = row.get("answer_index")
    if index is not None and (type(index) is not int or not 0 <= index < len(choices)):
        raise UserError(f"{place}: field 'answer_index' is {index!r}, not the number of one of {len(choices)} options")
    return Question(
        name,
        text("question", needed=not ready),
        text("answer", needed=True),
        tuple(choices),
        text("context", needed=task.has_context and not ready),
        index,
        text("prompt", needed=True) if ready else None,
        text("few_shot_prefix", needed=False),
    )
