"""The miniature world: the whole loop in minutes on two CPU cores.

Generated word problems with known answers (`world`), a small teacher that comes with the package and a smaller student
that starts from random weights (`models`), and the script that trained the teacher (`teacher`). All models are real
`LlamaForCausalLM` directories, so engines, trainer, graders and ledger treat them like any others.
"""
