"""Results as JSON lines, what they mean (medians, ratios), Markdown tables, and bounds to check."""

import json
import operator
import statistics

BEGIN, END = "<!-- bench/run report: begin -->", "<!-- bench/run report: end -->"
OPERATORS = {">=": operator.ge, "<=": operator.le}


class Results:
    """One file: a line about the machine, then one for each measurement."""

    def __init__(self, path, machine=None):
        self.path, self.machine, self.records = path, machine or {}, []

    def create(self):
        with open(self.path, "w") as file:
            file.write(json.dumps({"machine": self.machine}) + "\n")
        return self

    def add(self, record):
        self.records.append(record)
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")

    @staticmethod
    def load(path):
        results = Results(path)
        with open(path) as file:
            for line in file:
                record = json.loads(line)
                if "machine" in record:
                    results.machine = record["machine"]
                else:
                    results.records.append(record)
        return results

    def groups(self):
        """{(suite, workload, client): Group} in the order of measuring."""
        found = {}
        for record in self.records:
            found.setdefault((record["suite"], record["workload"], record["client"]), []).append(record)
        return {key: Group(records) for key, records in found.items()}


class Group:
    """All measurements of one workload with one client."""

    def __init__(self, records):
        self.unit, self.lower_is_better = records[0]["unit"], records[0]["lower_is_better"]
        self.servers = {}
        for record in records:
            self.servers.setdefault(record["server"], []).append(record)

    def is_peer(self, server):
        return not self.servers[server][0]["ours"] and not self.servers[server][0].get("reference")

    def is_ours(self, server):
        return self.servers[server][0]["ours"]

    def numbers(self, server, key="value"):
        return [record[key] for record in self.servers[server] if record.get(key) is not None]

    def median(self, server, key="value"):
        numbers = self.numbers(server, key)
        return statistics.median(numbers) if numbers else None

    def best_peer(self):
        """The peer with the best median; None when no peer was measured."""
        peers = [server for server in self.servers if self.is_peer(server)]
        choose = min if self.lower_is_better else max
        return choose(peers, key=self.median) if peers else None

    def ratio(self, server, other=None):
        """> 1: better than `other` (default: the best peer). The median of the ratios of each round, so that what
        disturbed both counts for neither."""
        other = other or self.best_peer()
        if other is None or server not in self.servers or other not in self.servers:
            return None
        of_round = {record["round"]: record["value"] for record in self.servers[other]}
        ratios = []
        for record in self.servers[server]:
            theirs = of_round.get(record["round"])
            if theirs and record["value"]:
                ratios.append(theirs / record["value"] if self.lower_is_better else record["value"] / theirs)
        return statistics.median(ratios) if ratios else None

    def least_peer_cpu(self):
        """Server CPU for each request of the peer that needs least, which need not be the fastest."""
        peers = [self.median(peer, "cpu_us") for peer in self.servers if self.is_peer(peer)]
        return min((cpu for cpu in peers if cpu), default=None)

    def cpu_ratio(self, server):
        own, least = self.median(server, "cpu_us"), self.least_peer_cpu()
        return own / least if own is not None and least else None


def number(value, form=None):
    if value is None:
        return ""
    if form:
        return form % value
    return "%.0f" % value if value >= 100 else "%.3g" % value


def row(group, server):
    values = group.numbers(server)
    cpu_ratio = group.cpu_ratio(server)
    noise = group.median(server, "noise")
    p99 = group.median(server, "p99_us")
    return [server, "%s %s" % (number(group.median(server)), group.unit), "%s..%s" % (number(min(values)), number(max(values))),
            number(group.ratio(server), "%.2f"), number(group.median(server, "cpu_us")), number(cpu_ratio, "%.2f"),
            number(group.median(server, "client_cpu_us")), number(p99), str(len(values)),
            number(noise * 100 if noise is not None else None, "%.0f%%")]


COLUMNS = ["workload", "client", "server", "median", "min..max", "ratio", "CPU us/op", "CPU ratio", "client CPU us/op",
           "p99 us", "rounds", "noise"]
OURS_COLUMNS = ["workload", "client", "server", "median", "best peer", "its median", "ratio", "CPU us/op",
                "least CPU of a peer", "CPU ratio"]


def table(columns, rows):
    return ["| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns)] + rows]


def ours_row(group, server):
    best = group.best_peer()
    return [server, "%s %s" % (number(group.median(server)), group.unit), best or "", number(group.median(best) if best else None),
            number(group.ratio(server), "%.2f"), number(group.median(server, "cpu_us")), number(group.least_peer_cpu()),
            number(group.cpu_ratio(server), "%.2f")]


def markdown(results):
    """Our servers against the best peers, then everything that was measured."""
    lines = ["Measured " + describe(results.machine), ""] if results.machine else []
    groups = results.groups()
    ours = [[suite + "/" + workload, client] + ours_row(group, server)
            for (suite, workload, client), group in groups.items() for server in group.servers if group.is_ours(server)]
    if ours:
        lines += table(OURS_COLUMNS, ours) + [""]
    for suite in dict.fromkeys(key[0] for key in groups):
        rows = [[workload, client] + row(group, server) for (of_suite, workload, client), group in groups.items()
                if of_suite == suite for server in group.servers]
        lines += ["### Every server: suite %s" % suite, ""] + table(COLUMNS, rows) + [""]
    return "\n".join(lines).rstrip() + "\n"


def describe(machine):
    values = {**machine, "versions": ", ".join(machine["versions"])}
    return "on {date}: {cpus} CPUs ({cpu}), {memory_gib} GiB, Linux {kernel}, {file_system}; images of {image_mib} MiB, " \
        "{seconds} s a run. {versions}.".format(**values)


def summary_line(key, group):
    """One line for a terminal: ours against the best peer, or else the peers."""
    best = group.best_peer()
    title = "%-34s %-5s" % ("%s/%s" % key[:2], key[2])
    texts = []
    for server in group.servers:
        text = "%s %s" % (server, number(group.median(server)))
        if not group.is_peer(server):
            ratio, cpu = group.ratio(server), group.cpu_ratio(server)
            text += " (ratio %s%s)" % (number(ratio, "%.2f"), ", CPU %.2f" % cpu if cpu is not None else "")
        elif server == best:
            text += "*"
        texts.append(text)
    return title + " " + group.unit + ": " + ", ".join(texts)


def update_page(path, text):
    """Replaces what stands between the two marks of a page."""
    with open(path) as file:
        page = file.read()
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError("%s must contain the lines '%s' and '%s' once each" % (path, BEGIN, END))
    before, rest = page.split(BEGIN)
    with open(path, "w") as file:
        file.write(before + BEGIN + "\n\n" + text + "\n" + END + rest.split(END)[1])


class Bound:
    """One line of a bounds file: suite/workload client server what operator number."""

    def __init__(self, line):
        where, self.client, self.server, self.what, sign, limit = line.split()
        self.suite, self.workload = where.split("/")
        self.compare, self.limit, self.text = OPERATORS[sign], float(limit), " ".join(line.split())
        if self.what not in ("ratio", "cpu", "value") and not self.what.startswith("vs:"):
            raise ValueError("'%s' is not ratio, cpu, value or vs:SERVER" % self.what)

    def measured(self, group):
        if self.server not in group.servers:
            return None
        if self.what == "ratio":
            return group.ratio(self.server)
        if self.what == "cpu":
            return group.cpu_ratio(self.server)
        if self.what == "value":
            return group.median(self.server)
        return group.ratio(self.server, self.what.removeprefix("vs:"))


def read_bounds(path):
    bounds = []
    with open(path) as file:
        for line_number, line in enumerate(file, 1):
            line = line.split("#")[0].strip()
            if not line:
                continue
            try:
                bounds.append(Bound(line))
            except (ValueError, KeyError) as error:
                raise ValueError("%s:%d: %s" % (path, line_number, error)) from error
    return bounds


def check(results, bounds):
    """Prints each bound with what was measured. Returns how many are missed; a bound whose workload was not run
    at all counts for nothing."""
    groups = results.groups()
    missed = 0
    for bound in bounds:
        group = groups.get((bound.suite, bound.workload, bound.client))
        if group is None:
            print("not run  %s" % bound.text)
            continue
        got = bound.measured(group)
        good = got is not None and bound.compare(got, bound.limit)
        missed += not good
        print("%-8s %s: %s" % ("ok" if good else "MISSED", bound.text, "no result" if got is None else "%.3g" % got))
    return missed
