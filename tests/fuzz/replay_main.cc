// Runs a fuzz entry over every file of the folders or files named on the command line (the saved corpus as a test).

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

size_t run_file(const std::filesystem::path& path) {
    std::ifstream in(path, std::ios::binary);
    std::vector<char> bytes{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    return 1;
}

}  // namespace

int main(int argc, char** argv) {
    size_t inputs = 0;
    for (int i = 1; i < argc; i++) {
        if (std::filesystem::is_directory(argv[i])) {
            for (const auto& entry : std::filesystem::recursive_directory_iterator(argv[i])) {
                if (entry.is_regular_file()) inputs += run_file(entry.path());
            }
        } else {
            inputs += run_file(argv[i]);
        }
    }
    std::printf("%zu inputs replayed\n", inputs);
    if (inputs == 0) {
        std::fprintf(stderr, "the corpus is empty or missing\n");
        return 1;
    }
    return 0;
}
