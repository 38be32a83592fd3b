"""What the rows of question sets say of the way to their answers: supporting facts, and the steps that lead to them."""
