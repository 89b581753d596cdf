// SizeWatch: after a change of the graph, sizes move up through it, bitmaps follow and roots are told.

#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "block/node.h"

namespace gantry::block {

/// Main loop. Made when the drain has begun; settle() before it ends, notify() after it.
class SizeWatch {
  public:
    /// Remembers what everything above `nodes` looks like.
    void start(std::vector<Node*> nodes);
    /// Bottom-up: every node above takes the sizes of its children again; bitmaps are resized.
    void settle();
    /// on_resize and on_node_changed of the roots whose node or size is another one now.
    void notify();

  private:
    struct SeenRoot {
        uint64_t size;
        const Node* node;
    };
    std::vector<std::shared_ptr<Node>> key_;
    std::unordered_map<Root*, SeenRoot> roots_;
};

}  // namespace gantry::block
