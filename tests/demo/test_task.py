from xorl.demo.task import EXAMPLES, NUM_HELD_OUT, SHOWN, Problem, problems


def test_only_the_sum_alone_on_its_line_is_rewarded():
    problem = Problem(27, 5)
    assert problem.reward("32\n") == 1.0
    for wrong in ("33\n", "32", "032\n", " 32\n", "32 \n", "32.\n", "32\n\n", "3", "\n", ""):
        assert problem.reward(wrong) == 0.0, wrong


def test_a_prompt_ends_where_the_answer_begins():
    assert Problem(27, 5).prompt == EXAMPLES + "27+5="


def test_the_examples_are_right_in_themselves():
    for line in EXAMPLES.splitlines():
        question, answer = line.split("=")
        assert sum(map(int, question.split("+"))) == int(answer)


def test_the_examples_are_neither_trained_on_nor_asked():
    assert not {*SHOWN} & {(problem.a, problem.b) for problem in [*problems()[0], *problems()[1]]}


def test_held_out_problems_are_never_trained_on():
    training, held_out = problems()
    assert len(held_out) == NUM_HELD_OUT
    assert len({*training, *held_out}) == len(training) + len(held_out)


def test_every_run_has_the_same_cut():
    assert problems() == problems()
