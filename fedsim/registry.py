"""Every named component on one line: where its class lives and what it is. Nothing is imported here."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Entry:
    """A component: `module:Class`, and one line for `fedsim list`."""

    path: str
    summary: str


_A, _P, _D, _S = "fedsim.algorithms", "fedsim.problems", "fedsim.problems.data", "fedsim.problems.partition"

KINDS: dict[str, dict[str, Entry]] = {
    "algorithm": {
        "dadao": Entry(f"{_A}.dadao:DADAO", "accelerated, asynchronous, gradients and gossip decoupled (events)"),
        "a2cid2": Entry(f"{_A}.a2cid2:A2CiD2", "asynchronous SGD, gossip accelerated by a second variable (events)"),
        "gossip_sgd": Entry(f"{_A}.a2cid2:GossipSGD", "asynchronous SGD with pairwise averaging (events)"),
        "randomised_gossip": Entry(f"{_A}.gossip:RandomisedGossip", "pairwise averaging of the starts (events)"),
        "accelerated_gossip": Entry(f"{_A}.gossip:AcceleratedGossip", "averaging with a second variable (events)"),
        "continuized": Entry(f"{_A}.continuized:Continuized", "accelerated in the dual, one clock of edges (events)"),
        "msda": Entry(f"{_A}.msda:MSDA", "accelerated dual ascent, Chebyshev gossip (rounds)"),
        "adom_plus": Entry(f"{_A}.adom:ADOMPlus", "accelerated primal method, multi-consensus optional (rounds)"),
        "dproxsgt": Entry(f"{_A}.dproxsgt:DProxSGT", "gradient tracking with a prox, one stochastic gradient (rounds)"),
        "cdproxsgt": Entry(f"{_A}.cdproxsgt:CDProxSGT", "the same with compressed messages (rounds)"),
        "gradient_tracking": Entry(f"{_A}.dproxsgt:GradientTracking", "dproxsgt without a prox (rounds)"),
        "prox_gt_sa": Entry(f"{_A}.dproxsgt:ProxGTSA", "dproxsgt with several mixings, for large batches (rounds)"),
        "deepstorm": Entry(f"{_A}.sgd:Deepstorm", "momentum-corrected gradients, tracked, with a prox (rounds)"),
        "dpsgd": Entry(f"{_A}.sgd:DPSGD", "SGD, then averaging with the neighbours; prox optional (rounds)"),
        "allreduce_sgd": Entry(f"{_A}.sgd:AllReduceSGD", "proximal SGD on the mean gradient of all (rounds)"),
        "choco_sgd": Entry(f"{_A}.cdproxsgt:ChocoSGD", "SGD with compressed averaging (rounds)"),
        "beer": Entry(f"{_A}.cdproxsgt:BEER", "gradient tracking with compressed messages (rounds)"),
        "fzoos": Entry(f"{_A}.fzoos:FZooS", "black boxes by Gaussian-process gradient surrogates (rounds)"),
        "fedzo": Entry(f"{_A}.federated:FedZO", "federated averaging on finite differences (rounds)"),
        "fedprox_zo": Entry(f"{_A}.federated:FedProxZO", "fedzo with a proximal pull to the server (rounds)"),
        "scaffold_zo": Entry(f"{_A}.federated:ScaffoldZO", "fedzo with control variates, options 1 and 2 (rounds)"),
        "fd_sgd": Entry(f"{_A}.federated:FiniteDifferenceSGD", "SGD on the mean finite difference (rounds)"),
        "fedavg": Entry(f"{_A}.federated:FedAvg", "federated averaging on gradients (rounds)"),
        "fedprox": Entry(f"{_A}.federated:FedProx", "fedavg with a proximal pull to the server (rounds)"),
        "scaffold": Entry(f"{_A}.federated:Scaffold", "fedavg with control variates (rounds)"),
        "diff2_gd": Entry(f"{_A}.diff2:DIFF2GD", "differentially private by gradient differences (rounds)"),
        "diff2_bvr_l_sgd": Entry(f"{_A}.diff2_bvr:DIFF2BVRLSGD", "the same with private local steps (rounds)"),
        "dp_gd": Entry(f"{_A}.private_sgd:DPGD", "private gradient descent (rounds)"),
        "dp_sgd": Entry(f"{_A}.private_sgd:DPSGD", "private SGD, records Poisson sampled (rounds)"),
        "dp_srm": Entry(f"{_A}.private_sgd:DPSRM", "private SGD with recursive momentum (rounds)"),
        "dp_fedavg": Entry(f"{_A}.dp_fedavg:DPFedAvg", "federated averaging, private per client (rounds)"),
        "moe_training": Entry(f"{_A}.moe_training:MoETraining", "experts spread over hosts, AdamW (rounds)"),
        "router_replay": Entry(f"{_A}.router_replay:RouterReplay", "balancing rules on router scores (rounds)"),
    },
    "problem": {
        "least_squares": Entry(f"{_P}.parameters:LeastSquaresParameters", "mean of (a'x - b)^2"),
        "ridge": Entry(f"{_P}.parameters:RidgeParameters", "least squares with l2"),
        "logistic": Entry(f"{_P}.parameters:LogisticParameters", "binary logistic regression with l2"),
        "nonconvex_logistic": Entry(
            f"{_P}.parameters:NonconvexLogisticParameters", "logistic regression, bounded penalty (not convex)"
        ),
        "multinomial": Entry(f"{_P}.parameters:MultinomialParameters", "softmax regression with l2"),
        "quadratic": Entry(
            f"{_P}.parameters:QuadraticParameters", "quadratics, given or random with a condition number"
        ),
        "consensus": Entry(f"{_P}.parameters:ConsensusParameters", "averaging: ||x - b_i||^2 / 2"),
        "module": Entry(f"{_P}.parameters:ModuleParameters", "a torch.nn.Module with a loss"),
        "synthetic_quadratic": Entry(
            f"{_P}.functions:SyntheticQuadraticParameters", "black boxes: quadratics with heterogeneity C"
        ),
        "test_function": Entry(
            f"{_P}.functions:TestFunctionParameters", "black boxes: Rosenbrock, Ackley, Levy, Rastrigin"
        ),
        "attack": Entry(f"{_P}.attack:AttackParameters", "black boxes: mislead the clients' classifiers by one image"),
        "metric_optimisation": Entry(
            f"{_P}.metric:MetricParameters", "black boxes: a model's weights for precision, recall, F1 or Jaccard"
        ),
        "function": Entry(f"{_P}.external:FunctionParameters", "black boxes: your own Python function"),
        "command": Entry(f"{_P}.external:CommandParameters", "black boxes: your own command, such as a simulator"),
        "shared_curvature": Entry(
            f"{_P}.shared_curvature:SharedCurvatureParameters", "nonconvex, records differ in the linear term only"
        ),
        "byte_language": Entry(
            f"{_P}.byte_language:ByteLanguageParameters", "bytes, a small transformer with mixtures of experts"
        ),
        "router_scores": Entry(
            f"{_P}.router_scores:RouterScoresParameters", "scores of tokens for experts (mixture of experts)"
        ),
    },
    "data": {
        "breast_cancer": Entry(f"{_D}.known:BreastCancer", "569 x 30, two classes, inside scikit-learn"),
        "diabetes": Entry(f"{_D}.known:Diabetes", "442 x 10, regression, inside scikit-learn"),
        "digits": Entry(f"{_D}.known:Digits", "1797 x 64, ten classes, inside scikit-learn"),
        "iris": Entry(f"{_D}.known:Iris", "150 x 4, three classes, inside scikit-learn"),
        "wine": Entry(f"{_D}.known:Wine", "178 x 13, three classes, inside scikit-learn"),
        "adult": Entry(f"{_D}.known:Adult", "48842 x 104, two classes; `fedsim data get adult`"),
        "bike": Entry(f"{_D}.known:Bike", "17379 x 12, regression; `fedsim data get bike`"),
        "california_housing": Entry(f"{_D}.known:CaliforniaHousing", "20640 x 8, regression; `fedsim data get ...`"),
        "fashion_mnist": Entry(f"{_D}.known:FashionMnist", "60000 x 784, ten classes; `fedsim data get fashion_mnist`"),
        "mnist": Entry(f"{_D}.known:Mnist", "60000 x 784, ten classes; `fedsim data get mnist`"),
        "python_docs": Entry(f"{_D}.texts:PythonDocs", "text: Python's help, 80 topics, part of every Python"),
        "king_james": Entry(f"{_D}.texts:KingJames", "text: 66 books; `fedsim data get king_james`"),
        "presidents": Entry(f"{_D}.texts:Presidents", "text: speeches of 43 presidents; `fedsim data get presidents`"),
        "text": Entry(f"{_D}.texts:TextFile", "your own text, or a folder of them"),
        "csv": Entry(f"{_D}.files:Csv", "your own CSV table"),
        "parquet": Entry(f"{_D}.files:Parquet", "your own Parquet table"),
        "npz": Entry(f"{_D}.files:Npz", "your own NumPy arrays"),
        "libsvm": Entry(f"{_D}.files:Libsvm", "your own LIBSVM file"),
        "synthetic_regression": Entry(f"{_D}.synthetic:SyntheticRegression", "linear model, heterogeneity by nodes"),
        "synthetic_classification": Entry(f"{_D}.synthetic:SyntheticClassification", "softmax model, heterogeneity"),
        "synthetic_lasso": Entry(f"{_D}.synthetic:SyntheticLasso", "a sparse model per node, without random numbers"),
        "teacher_network": Entry(f"{_D}.synthetic:TeacherNetwork", "regression on a random tanh network"),
        "dadao_regression": Entry(f"{_D}.synthetic:DadaoRegression", "the regression of the DADAO experiments"),
        "dadao_classification": Entry(f"{_D}.synthetic:DadaoClassification", "the classification of the same"),
    },
    "partition": {
        "iid": Entry(f"{_S}:Iid", "at random, equal sizes"),
        "sorted": Entry(f"{_S}:Sorted", "by label, in order"),
        "shards": Entry(f"{_S}:Shards", "a few shards of sorted labels each"),
        "dirichlet": Entry(f"{_S}:Dirichlet", "each label over the nodes by Dirichlet(alpha)"),
        "dirichlet_labels": Entry(f"{_S}:DirichletLabels", "each node's labels by Dirichlet(alpha), equal sizes"),
        "dirichlet_sizes": Entry(f"{_S}:DirichletSizes", "sizes by Dirichlet(alpha), labels at random"),
        "round_robin": Entry(f"{_S}:RoundRobin", "record i to node i mod n"),
        "column": Entry(f"{_S}:Column", "by a column of the data"),
        "node": Entry(f"{_S}:Node", "as the synthetic data were drawn"),
    },
}

_R, _C = "fedsim.problems.composite", "fedsim.compression.compressors"
KINDS["composite"] = {
    "none": Entry(f"{_R}:Nothing", "no term"),
    "l1": Entry(f"{_R}:L1", "weight ||x||_1"),
    "elastic_net": Entry(f"{_R}:ElasticNet", "l1 ||x||_1 + (l2/2) ||x||^2"),
    "group_lasso": Entry(f"{_R}:GroupLasso", "weight sum of sqrt(size) ||x_g||_2 over groups"),
    "mcp": Entry(f"{_R}:MCP", "minimax concave penalty (weakly convex)"),
    "scad": Entry(f"{_R}:SCAD", "smoothly clipped absolute deviation (weakly convex)"),
    "box": Entry(f"{_R}:Box", "low <= x <= high"),
    "ball": Entry(f"{_R}:Ball", "||x||_2 <= radius"),
    "non_negative": Entry(f"{_R}:NonNegative", "x >= 0"),
}
KINDS["compressor"] = {
    "identity": Entry(f"{_C}:Identity", "everything, in the state's own width"),
    "top_k": Entry(f"{_C}:TopK", "the entries of largest magnitude"),
    "random_k": Entry(f"{_C}:RandomK", "entries drawn by a seed that travels instead of their places"),
    "qsgd": Entry(f"{_C}:QSGD", "levels of the norm, rounded at random"),
    "uniform": Entry(f"{_C}:Uniform", "levels of the largest magnitude, rounded at random"),
    "natural": Entry(f"{_C}:Natural", "powers of two, rounded at random: 9 bits a number"),
    "sign": Entry(f"{_C}:Sign", "signs times the mean magnitude: 1 bit a number"),
    "low_precision": Entry(f"{_C}:LowPrecision", "bfloat16, float16 or float32"),
}
KINDS["model"] = {
    "softmax": Entry("fedsim.problems.models.mlp:mlp", "one linear layer (linear regression for numbers)"),
    "mlp": Entry("fedsim.problems.models.mlp:mlp", "linear layers with an activation between"),
    "lenet5": Entry("fedsim.problems.models.lenet5:LeNet5", "two convolutions, three linear layers, for images"),
    "residual_cnn": Entry("fedsim.problems.models.residual_cnn:ResidualCNN", "residual blocks without batch norm"),
    "transformer": Entry("fedsim.problems.models.transformer:Transformer", "characters in, the next one out; for text"),
}

GRAPHS = "ring path star complete grid torus hypercube barbell random_geometric random_regular exponential server"
RATES = "uniform metropolis degree sdp"
MIXINGS = "metropolis max_degree fdla fastest_mixing"


def known(section: str, kind: str) -> Entry:
    """Return the entry of a kind.

    Raises:
        InputError: it is not known; says which are.
    """
    kinds = KINDS[section]
    if kind not in kinds:
        hint = did_you_mean(kind, kinds)
        raise InputError(
            f"{section}.kind: {kind!r} is not known{hint}; known: {', '.join(kinds)};"
            " or your own, as package.module:Class or file.py:Class"
        )
    return kinds[kind]


def find(section: str, kind: str, base: Path) -> Any:
    """Return the class behind a registered name, `package.module:Class`, or `file.py:Class` beside the scenario.

    Modules are looked for beside the scenario, too.

    Raises:
        InputError: there is no such name, module, file or class.
    """
    path = kind if ":" in kind else known(section, kind).path
    module, _, name = path.rpartition(":")
    try:
        loaded = _users(module, base) if ":" in kind else importlib.import_module(module)
    except ModuleNotFoundError as error:
        own = error.name is not None and (module == error.name or module.startswith(f"{error.name}."))
        hint = "give package.module:Class or file.py:Class" if own else "which the code imports"
        raise InputError(f"{section}.kind: {kind!r}: {error}; {hint}") from error
    if not hasattr(loaded, name):
        names = [n for n in dir(loaded) if not n.startswith("_")]
        raise InputError(f"{section}.kind: {module} has no {name!r}{did_you_mean(name, names)}")
    return getattr(loaded, name)


def fingerprint(kind: str, base: Path) -> str | None:
    """Return the SHA-256 of the file behind `file.py:Class`, None for everything else."""
    module = kind.rpartition(":")[0]
    return hashlib.sha256((base / module).read_bytes()).hexdigest() if module.endswith(".py") else None


def _users(module: str, base: Path) -> Any:
    """Import a user's file or module; what it imports in turn may lie beside the scenario."""
    here = str(base.resolve())
    if here not in sys.path:
        sys.path.append(here)
    if module.endswith(".py"):
        return _from_file(base / module)
    beside = base / f"{module}.py"
    return _from_file(beside) if beside.is_file() else importlib.import_module(module)


def _from_file(file: Path) -> Any:
    if not file.is_file():
        raise InputError(f"{file}: no such file; a user's own class is looked for beside the scenario")
    name = f"_fedsim_user_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
