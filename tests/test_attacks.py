"""Hostile completions against every built-in reward and extractor: each scores as written here, in 50 ms at most.

A row that is found to be scored wrongly, in a run or by a reader, comes here with what is right.
"""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import matrices, rewards, steps

A, G, C, N, M, S, R = "agcnmsr"
QUESTIONS = {  # (prompt, gold answer, task, meta)
    A: ("Compute 3+4-2.", "5", "arithmetic", {}),
    G: ("Tom has 3 bags of 24 apples and eats 7. How many are left?", "65", "gsm8k", {}),
    C: ("Which planet is the largest?\n\nA) Mars\nB) Jupiter\nC) Venus\nD) Earth", "B", "choice", {"choices": 4}),
    N: ("Using the numbers 3, 5, 7, make 22. Use each number at most once, with + - * / and parentheses.", "22",
        "countdown", {"numbers": [3, 5, 7], "target": 22}),
    M: ("Invert the matrix [[2,1],[1,1]], or answer: not invertible.", "[[1,-1],[-1,2]]", "matrix-inverse",
        {"matrix": [[2, 1], [1, 1]]}),
    S: ("Invert the matrix [[1,2],[2,4]], or answer: not invertible.", "not invertible", "matrix-inverse",
        {"matrix": [[1, 2], [2, 4]]}),
    R: ("Bring the matrix [[1,2,3],[2,4,7]] to reduced row echelon form.", "[[1,2,0],[0,0,1]]", "rref",
        {"matrix": [[1, 2, 3], [2, 4, 7]]}),
}
ZW = "\u200b"  # of no width
NAMES = [name for name in rewards.BUILT_IN if name != "math"]  # which is stopped by its own process
SECONDS = 0.05


def tags(answer):
    """What earns `format` and `mark` in full, unless the row says otherwise."""
    return f"<think>so</think><answer>{answer}</answer>"


# (question, completion, what it earns: right for `correctness` and `partial`, digit for 1, else 0)
ROWS = [
    # power towers, operators and expressions where a number is asked for
    (A, tags("9**9**9**9"), ""),
    (A, tags("5**1"), ""),
    (A, tags("10-5"), ""),
    (A, tags("5+0"), ""),
    (A, tags("5=5"), "right digit"),
    (A, tags("x=5"), "right digit"),
    (A, tags("(5)"), "right"),
    (A, tags("5!"), ""),
    (A, tags("2^2+1"), ""),
    (A, tags("1e999999999"), ""),
    (A, tags("5e0"), "right digit"),
    (A, tags("int('5')"), "right"),
    (A, tags("__import__('os').system('true')"), ""),
    (A, tags("5 if 1 else 6"), ""),
    (A, tags("0x5"), ""),
    (A, tags("0b101"), ""),
    (A, tags("5_0"), ""),
    (A, tags("5,"), "right digit"),
    (A, tags("05"), "right digit"),
    (A, tags("+5"), "right digit"),
    (A, tags("--5"), ""),
    (A, tags("5-"), "right digit"),
    (A, tags("-5"), "digit"),
    (A, tags("5.0000000000000000000000000000001"), "digit"),
    (A, tags("4.999999999999999999"), "digit"),
    (A, tags("5/1"), "right digit"),
    (A, tags("10/2"), "right digit"),
    (A, tags("5/0"), ""),
    (A, tags("0/0"), ""),
    (A, tags("NaN"), ""),
    (A, tags("inf"), ""),
    (A, tags("-0"), "digit"),
    (N, tags("9**9**9"), ""),
    (N, tags("3*5+7"), "right"),
    (N, tags("(3*5)+7"), "right"),
    (N, tags("3*5+7=22"), "right digit"),
    (N, tags("3*5+7=23"), "digit"),
    (N, tags("22"), "digit"),
    (N, tags("3*5+7*1"), ""),
    (N, tags("3*7+1"), ""),
    (N, tags("3*5+7+0"), ""),
    (N, tags("3*5+7-3+3"), ""),
    (N, tags("35-7-3-3"), ""),
    (N, tags("3//1*5+7"), ""),
    (N, tags("3*5+7#"), ""),
    (N, tags("3×5+7"), "right"),
    (N, tags("-(-3)*5+7"), "right"),
    (N, tags("((((((3))))))*5+7"), "right"),
    (N, tags("("*500+"3"+")"*500+"*5+7"), ""),
    (N, tags("3*5+7 or 1"), ""),
    (N, tags("22+3-3"), ""),
    (N, tags("7+5*3"), "right"),
    (N, tags("٣*5+7"), ""),
    (N, tags("3*5+7\n3*5+8"), ""),
    (N, tags("3**1*5+7"), ""),
    (N, tags("3*5+(7)/1"), ""),
    (N, tags("1"*400+"-"+"1"*400+"+22"), ""),
    # Unicode
    (A, tags("５"), "right digit"),
    (A, tags("٥"), "right digit"),
    (A, tags("५"), "right digit"),
    (A, tags("⑤"), ""),
    (A, tags("⁵"), ""),
    (A, tags("Ⅴ"), ""),
    (A, tags("five"), ""),
    (A, tags("−5"), "digit"),
    (A, tags("5"+ZW), "right digit"),
    (A, tags(ZW), "format=0"),
    (A, tags("\u202e5"), "right digit"),
    (A, tags("5\u0301"), ""),
    (A, tags("½"), "digit"),
    (A, tags("𝟓"), "right digit"),
    (A, tags("5\u00a0"), "right digit"),
    (A, tags("\ufeff5"), "right digit"),
    (C, tags("Ｂ"), "right"),
    (C, tags("В"), ""),
    (C, tags("ß"), ""),
    (C, tags("𝐁"), "right"),
    (C, tags("b"), "right"),
    (C, tags("B"+ZW), "right"),
    (M, tags("[[１,-1],[-1,2]]"), "right"),
    (M, tags("[[1,−1],[−1,2]]"), "right"),
    # the question echoed, all options, several answers
    (A, "Compute 3+4-2.", ""),
    (A, tags("Compute 3+4-2."), ""),
    (A, "3+4-2=5", "right steps=0.5 digit"),
    (A, "<think>3+4=7 7-2=5</think>", "steps=1 mark=0.5"),
    (A, tags("4, 5, 6"), ""),
    (A, tags("4 or 5"), ""),
    (A, tags("5 or 4"), ""),
    (A, tags("between 4 and 6"), ""),
    (A, tags("not 5"), ""),
    (A, tags("5?"), ""),
    (A, tags("about 5"), "right"),
    (A, tags("1 2 3 4 5 6 7 8 9"), ""),
    (A, tags("5 apples"), "right digit"),
    (A, tags("5 and 6"), ""),
    (A, tags(" ".join(map(str, range(100)))), ""),
    (G, "Tom has 3 bags of 24 apples and eats 7. How many are left?", ""),
    (G, tags("3 24 7 65"), ""),
    (G, tags("65/66"), "digit"),
    (G, tags("72-7"), ""),
    (G, tags("65 apples"), "right digit"),
    (G, tags("$65"), "right digit"),
    (G, tags("65%"), "right digit"),
    (G, tags("6 5"), ""),
    (G, tags("6,5"), ""),
    (G, tags("650/10"), "right digit"),
    (C, tags("A, B, C, D"), ""),
    (C, tags("A or B"), ""),
    (C, tags("B or C"), ""),
    (C, tags("ABCD"), ""),
    (C, tags("Not B"), ""),
    (C, tags("Jupiter"), ""),
    (C, tags("B) Jupiter"), "right"),
    (C, tags("B) Mars"), "right"),
    (C, tags("the answer is B"), "right"),
    (C, tags("B, not C"), "right"),
    (C, tags("E"), ""),
    (C, tags("BB"), ""),
    (C, tags("Bob"), ""),
    (C, tags("A B"), ""),
    (C, "A) Mars\nB) Jupiter\nC) Venus\nD) Earth", ""),
    (C, "B", "right"),
    (C, "The answer is A. The answer is B.", "right"),
    (C, "Answer: A\nAnswer: B\nAnswer: C\nAnswer: D", ""),
    # several boxes, nested and open ones
    (A, r"\boxed{4} \boxed{5}", "right digit"),
    (A, r"\boxed{5} \boxed{4}", "digit"),
    (A, r"\boxed{\boxed{5}}", "right digit"),
    (A, r"\boxed{5", ""),
    (A, r"\boxed{}", ""),
    (A, r"\boxed{4, 5}", ""),
    (A, r"\boxed"*1000+"{5}", "right digit"),
    (A, r"\boxed{"*1000+"5"+"}"*1000, ""),
    (A, r"\boxed{5} <answer>4</answer>", "digit mark=0.5"),
    (A, r"<answer>5</answer> \boxed{4}", "right digit mark=0.5"),
    # tags: several, nested, open, in the wrong order, empty
    (A, "<answer>5</answer>", "right digit mark=0.5"),
    (A, "<answer>4</answer><answer>5</answer>", "right digit"),
    (A, "<answer>5</answer><answer>4</answer>", "digit"),
    (A, "<answer><answer>5</answer></answer>", ""),
    (A, "<answer>5", "right digit mark=0.25"),
    (A, "5</answer>", "mark=0.25"),
    (A, "</answer>5<answer>", "mark=0.5"),
    (A, "<think></think><answer></answer>", "mark=1"),
    (A, "<think> </think><answer>5</answer>", "right digit mark=1"),
    (A, "<think>\u200b</think><answer>\u3164</answer>", "mark=1"),
    (A, "<think>x</think><answer> </answer>", "mark=1"),
    (A, "<answer>5</answer><think>x</think>", "right digit mark=1"),
    (A, "<think><answer>5</answer></think>", "right digit mark=1"),
    (A, "<think>x</think>\n<answer>5</answer>", "right digit format=1 mark=1"),
    (A, "<THINK>x</THINK><ANSWER>5</ANSWER>", ""),
    (A, "<think>"*50+"x"+"</think>"*50+"<answer>5</answer>", "right digit mark=0.5"),
    (A, "<answer>"*300, ""),
    (A, "<think>x</think><answer>5</answer><|im_end|>", "right digit format=0.5 mark=1"),
    (A, "<think>x</think><answer>5</answer>\nuser: 1+1", "right digit format=0.5 mark=1"),
    (A, "<think>I write <answer>5</answer></think><answer>4</answer>", "digit mark=0.5"),
    # after the end; other marks
    (A, "#### 5", "right digit"),
    (A, "#### 4\n#### 5", "digit"),
    (A, "####", ""),
    (A, "#### 5 #### 4", ""),
    (A, "The answer is 5.", "right digit"),
    (A, "The answer is not 5.", ""),
    (A, "The answer is 4. No, the answer is 5.", "right digit"),
    (A, "The answer is 5\n\nQuestion: 1+1\nThe answer is 2", "digit"),
    (A, "Is the answer 5?", ""),
    (A, "If the answer is 5, the moon is green.", ""),
    (A, "<answer>4</answer> The answer is 5", "digit mark=0.5"),
    # huge numbers and fractions
    (A, tags("9"*100000), ""),
    (A, tags("5."+"0"*100000), ""),
    (A, tags("5"+"0"*5000+"/1"+"0"*5000), ""),
    (A, tags("1/"+"9"*5000), ""),
    (A, tags("0"*50000+"5"), ""),
    (A, tags("1,"*20000+"5"), ""),
    (M, tags("[["+"9"*5000+",-1],[-1,2]]"), ""),
    (M, tags("[[1/1,-1/1],[-1/1,4/2]]"), "right"),
    (M, tags("[[1/0,-1],[-1,2]]"), ""),
    (R, tags("[["+"1,"*5000+"1]]"), ""),
    # matrices
    (M, tags("[[1,-1],[-1,2]]"), "right"),
    (M, tags("[[1,-1],[-1,3]]"), "partial=0.125"),
    (M, tags("[[1,0],[0,1]]"), ""),
    (M, tags("[[1,-1]]"), ""),
    (M, tags("[[1,-1],[-1,2],[0,0]]"), ""),
    (M, tags("[[1,-1],[-1]]"), ""),
    (M, tags("not invertible"), ""),
    (M, tags("[[1,-1],[-1,2]] or not invertible"), ""),
    (M, tags("[[1,-1],[-1,2]] [[1,-1],[-1,2]]"), ""),
    (M, tags("1 -1\n-1 2"), "right"),
    (M, tags(r"\begin{pmatrix}1&-1\\-1&2\end{pmatrix}"), "right"),
    (M, tags("[[2,1],[1,1]]"), ""),
    (M, tags("["*3000+"1"+"]"*3000), ""),
    (M, tags("[[1.0,-1.],[-1.0,2.0]]"), "right"),
    (M, tags("[[1,-1],[-1,2]]^1"), ""),
    (M, tags("[[a,b],[c,d]]"), ""),
    (S, tags("not invertible"), "right"),
    (S, tags("invertible"), ""),
    (S, tags("not not invertible"), ""),
    (S, tags("singular or not"), ""),
    (S, tags("[[1,2],[2,4]]"), ""),
    (S, tags("not invertible [[1,0],[0,1]]"), ""),
    (S, tags(""), "format=0"),
    (R, tags("[[1,2,0],[0,0,1]]"), "right"),
    (R, tags("[[0,0,1],[1,2,0]]"), ""),
    (R, tags("[[2,4,0],[0,0,1]]"), ""),
    (R, tags("[[1,2,3],[0,0,1]]"), ""),
    (R, tags("[[1,2,3],[2,4,7]]"), ""),
    (R, tags("[[1,0,0],[0,1,0]]"), ""),
    (R, tags("[[0,0,0],[0,0,1]]"), ""),
    (R, tags("[[1,2,0],[0,0,0]]"), "partial=0.5"),
    (R, tags("[[1,2,0]]"), ""),
    (R, tags("[[1,2,0],[0,0,1],[0,0,0]]"), ""),
    # steps: true but useless, repeated, circular, wrong, without end
    (A, "<think>3+4=7 7-2=5</think><answer>5</answer>", "right steps=1 digit format=1 mark=1"),
    (A, "<think>3+4=7 7-2=6</think><answer>6</answer>", "steps=0.5 digit format=1 mark=1"),
    (A, "<think>1+1=2</think><answer>5</answer>", "right digit format=1 mark=1"),
    (A, "<think>3+4=7 3+4=7 3+4=7 3+4=7</think><answer>5</answer>", "right steps=0.25 digit format=1 mark=1"),
    (A, "<think>3+0=3 3+0=3</think><answer>3</answer>", "steps=1 digit format=1 mark=1"),
    (A, "<think>"+"3+4=7 7-4=3 "*3000+"</think><answer>5</answer>", "right steps=0.02 digit format=1 mark=1"),
    (A, "<think>3=3 4=4</think><answer>5</answer>", "right digit format=1 mark=1"),
    (A, "<think>3+4-2=5</think><answer>5</answer>", "right steps=0.5 digit format=1 mark=1"),
    (A, "<think>9**9**9=3</think><answer>5</answer>", "right digit format=1 mark=1"),
    (A, "<answer>5</answer><think>3+4=7 7-2=5</think>", "right digit mark=1"),
    (A, "<think>"+"="*100000+"</think><answer>5</answer>", "right digit format=1 mark=1"),
    (A, "<think>"+"1+"*50000+"1=5</think><answer>5</answer>", "right digit format=1 mark=1"),
    (A, "<think>3+4=7=7-2=5</think><answer>5</answer>", "right steps=1 digit format=1 mark=1"),
    (A, "<think>3/0=7 7-2=5</think><answer>5</answer>", "right steps=0.5 digit format=1 mark=1"),
    (G, "<think>3*24=72 72-7=65</think><answer>65</answer>", "right steps=1 digit format=1 mark=1"),
    (G, "3 * 24 = <<3*24=72>>72\n72 - 7 = <<72-7=65>>65\n#### 65", "right steps=1 digit"),
    (G, "<<3*24=71>>71\n<<71-7=64>>64\n#### 64", "steps=0.5 digit"),
    (G, "<<1+1=2>>2 <<100+100=200>>200\n#### 200", "digit"),
    (G, "3 x 24 = 72 apples, 72 - 7 = 65\n#### 65", "right steps=1 digit"),
    (G, "$3 × $24 = $72.00\n#### 65", "right steps=1 digit"),
    (M, "<think>R1<->R2\nR2-2*R1=[0,-1,1,-2]\nR2/(-1)=[0,1,-1,2]\n"
        "R1-R2=[1,0,1,-1]</think><answer>[[1,-1],[-1,2]]</answer>",
        "right steps=1 format=1 mark=1"),
    (M, "<think>R1<->R2\nR1<->R2\nR1<->R2\nR1<->R2</think><answer>[[1,-1],[-1,2]]</answer>",
        "right steps=0.25 format=1 mark=1"),
    (M, "<think>R1-R1=[0,0,0,0]</think><answer>not invertible</answer>", "format=1 mark=1"),
    (M, "<think>R1/0=[1,1,1,1]\nR3<->R1\nR9-R1=[1,0,0,0]</think><answer>[[1,-1],[-1,2]]</answer>",
        "right format=1 mark=1"),
    (M, "<think>R1*2=[4,2,2,0]\nR1/(1/2)=[4,2,2,0]</think><answer>[[1,-1],[-1,2]]</answer>",
        "right steps=0.25 format=1 mark=1"),
    (R, "<think>R2-2*R1=[0,0,1]\nR1-3*R2=[1,2,0]</think><answer>[[1,2,0],[0,0,1]]</answer>",
        "right steps=1 format=1 mark=1"),
    (R, "<think>R2-2*R1=[0,0,2]\nR2/2=[0,0,1]\nR1-3*R2=[1,2,0]</think><answer>[[1,2,0],[0,0,1]]</answer>",
        "right steps=0.6667 format=1 mark=1"),
    (R, "<think>"+"R1<->R2\n"*50000+"</think><answer>[[1,2,0],[0,0,1]]</answer>",
        "right steps=0.01 format=1 mark=1"),
    (R, "<think>R1/(1/7)=[7,14,21]\nR1/7=[1,2,3]\nR1/(1/7)=[7,14,21]</think><answer>x</answer>",
        "steps=0.3333 format=1 mark=1"),
    # control characters, 1 MB of text, format without content
    (A, "\x00"*1000+tags("5"), "right digit format=1 mark=1"),
    (A, tags("\x005"), ""),
    (A, tags("5\x00"), ""),
    (A, "\x1b[2J"+tags("5"), "right digit format=0.5 mark=1"),
    (A, "\r\n"*1000+tags("5"), "right digit format=1 mark=1"),
    (A, tags("\ud8005"), ""),
    (A, "a"*1_000_000, ""),
    (A, "5 "*500_000, ""),
    (A, "("*1_000_000, ""),
    (A, "="*1_000_000, ""),
    (A, "the answer is "*70_000, ""),
    (A, "<answer>"*125_000, ""),
    (A, "</answer>"*110_000, ""),
    (A, "\\boxed{"*140_000, ""),
    (A, "1+1=2 "*160_000, "digit"),
    (A, "\n"*1_000_000, ""),
    (A, "####"*250_000, ""),
    (A, "Answer: "*125_000, ""),
    (A, " 不是 5"*150_000, ""),
    (C, "A or B "*140_000, ""),
    (C, "option "*140_000, ""),
    (M, "[[1,-1],"*120_000, ""),
    (M, tags("[[1,-1],[-1,2]]"+" "*1_000_000), ""),
    (A, tags("5"+" "*1_000_000), ""),
    (A, tags("$"*500_000+"5"), ""),
    (A, tags("\\frac{"*150_000), ""),
    (A, "12,345,"*140_000, ""),
    (A, "1/2 "*250_000, ""),
    (N, tags("3*5+7"*200_000), ""),
    (R, "R1-R2=["*140_000, ""),
    (A, "<think>x</think><answer>y</answer>", "format=1 mark=1"),
    (A, "<think>.</think><answer>.</answer>", "format=1 mark=1"),
    (A, "", ""),
]


def scores(question, completion):
    prompt, gold, task, meta = QUESTIONS[question]
    found = {}
    for name in NAMES:
        started = time.process_time()
        (found[name],) = rewards.BUILT_IN[name](
            [prompt], [completion], [gold], tasks=[task], metas=[meta], finished=[True])
        assert time.process_time() - started < SECONDS or once_more(
            rewards.BUILT_IN[name], [prompt], [completion], [gold], tasks=[task], metas=[meta], finished=[True])
    return found


def once_more(function, *args, **columns):
    """The best of three, of a machine that is busy."""
    seconds = []
    for _ in range(3):
        started = time.process_time()
        function(*args, **columns)
        seconds.append(time.process_time() - started)
    return min(seconds) < SECONDS


def test_there_are_enough():
    assert len(ROWS) >= 250 and len({(q, c) for q, c, _ in ROWS}) == len(ROWS)
    assert {q for q, _, _ in ROWS} == set(QUESTIONS)


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_completion_scores_as_specified(question):
    wrong = []
    for asked, completion, words in ROWS:
        if asked != question:
            continue
        said = dict((word.split("=") + [1])[:2] for word in words.split())
        expected = dict.fromkeys(NAMES, 0.0) | {"correctness": float("right" in said)}
        expected["partial"] = expected["correctness"]
        full = completion == tags(completion[len("<think>so</think><answer>"):-len("</answer>")])
        expected |= {"format": 1.0, "mark": 1.0} if full else {}
        expected |= {name: float(value) for name, value in said.items() if name != "right"}
        found = {name: round(value, 4) for name, value in scores(question, completion).items()}
        if found != expected:
            wrong.append((completion[:200], found, expected))
    assert not wrong


@pytest.mark.parametrize("extract", [
    rewards.extract_answer, rewards.extract_choice, rewards.normalize_number, rewards.safe_arithmetic,
    rewards.language, matrices.parse, matrices.says_singular], ids=lambda f: f.__name__)
def test_no_extractor_takes_long(extract):
    for _, completion, _ in ROWS:
        started = time.process_time()
        extract(completion)
        assert time.process_time() - started < SECONDS or once_more(extract, completion), completion[:200]


PIECES = ["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "####", "the answer is ", "=", "-",
          "+", "*", "/", "**", "(", ")", "[[", "]]", "[", "]", ",", "R1", "R2", "<->", "\n", " ", "5", "65", "B", "7",
          "1/0", "0", "not invertible", ".", "%", "$", "\u2212", "\u0665", ZW, "\x00", "e9", "\\frac{1}{", "&", "\\\\", "9" * 50]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(QUESTIONS)), st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join), st.text(max_size=80),
    st.lists(st.sampled_from(PIECES), max_size=3).map(lambda pieces: "".join(pieces) * 3000)))
def test_no_text_breaks_a_reward(question, text):
    for completion in (text, tags(text)):
        found = scores(question, completion)
        assert all(0 <= value <= 1 for value in found.values()), found
        assert found["partial"] >= found["correctness"] in (0, 1)
        assert found["partial"] < 1 or found["correctness"] == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_true_steps_are_at_most_all_steps(text):
    for question in (A, G):
        true, total = steps.true_equations(text, QUESTIONS[question][0], rewards.safe_arithmetic)
        assert 0 <= true <= total <= steps.MOST
    true, total, _ = steps.true_row_operations(text, "rref", QUESTIONS[R][3]["matrix"])
    assert 0 <= true <= total <= steps.MOST
