// GraphFixture: a runtime and a graph with the drivers of the unit tests; closes everything at its end.

#pragma once

#include <boost/json/parse.hpp>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "block/formats/raw.h"
#include "block/graph.h"
#include "block/protocols/null.h"
#include "tests/support/memory_node.h"
#include "tests/support/test_runtime.h"

namespace gantry::test {

/// R"({'driver': 'raw', ...})" with single quotes for readability.
inline json::object options_of(std::string text) {
    for (char& c : text) {
        if (c == '\'') c = '"';
    }
    return json::parse(text).as_object();
}

struct GraphFixture {
    /// `extra`: drivers of the test's own.
    explicit GraphFixture(block::Observer* observer = nullptr, std::vector<block::Driver> extra = {})
        : drivers{block::kNullCoDriver, block::kNullAioDriver, block::kRawDriver, kMemoryDriver} {
        drivers.insert(drivers.end(), extra.begin(), extra.end());
        graph = std::make_unique<block::Graph>(*runtime.runtime, drivers, observer);
    }
    ~GraphFixture() {
        runtime.run(graph->close_all());
        graph.reset();
    }

    template <class T>
    T run(Task<T> task) {
        return runtime.run(std::move(task));
    }
    /// blockdev-add; the error text on failure, "" on success.
    std::string add(std::string text) { return text_of(run(graph->add(options_of(std::move(text))))); }
    std::string remove(std::string_view name) { return text_of(run(graph->remove(name))); }
    std::string reopen(std::vector<std::string> texts) {
        std::vector<json::object> list;
        for (auto& text : texts) list.push_back(options_of(std::move(text)));
        return text_of(run(graph->reopen(std::move(list))));
    }
    block::Node& node(std::string_view name) {
        block::Node* found = graph->find(name);
        if (!found) throw std::runtime_error("no node " + std::string(name));
        return *found;
    }
    /// Names, newest first, joined with blanks.
    std::string names() {
        std::string all;
        for (const block::Node* n : graph->nodes()) all += (all.empty() ? "" : " ") + n->name();
        return all;
    }
    template <class T>
    static std::string text_of(const Result<T>& result) {
        return result ? std::string() : result.error().message();
    }

    static block::RootOptions reader(std::string user = "a reader") {
        block::RootOptions o;
        o.perms = {block::Perm::kConsistentRead, ~block::Perm::kResize};
        o.user = std::move(user);
        return o;
    }
    static block::RootOptions writer(std::string user = "a writer") {
        block::RootOptions o = reader(std::move(user));
        o.perms.need |= block::Perm::kWrite;
        return o;
    }
    std::unique_ptr<block::Root> attach(std::string_view name, block::RootOptions options) {
        auto root = run(graph->attach(node(name), std::move(options)));
        if (!root) throw std::runtime_error(root.error().message());
        return std::move(*root);
    }
    void detach(std::unique_ptr<block::Root> root) { run(graph->detach(std::move(root))); }

    TestRuntime runtime;
    std::vector<block::Driver> drivers;
    std::unique_ptr<block::Graph> graph;
};

}  // namespace gantry::test
