// Draws a picture: draw [PROMPT [FILE.png]]
#include <sparvar/pipeline.h>

#include <iostream>

int main(int argc, char** argv) {
  try {
    sparvar::Pipeline pipeline = sparvar::Pipeline::load({});  // the bundled model, all cores
    const sparvar::ModelInfo& model = pipeline.info();

    sparvar::GenerateOptions options;
    options.prompts = {argc > 1 ? argv[1] : "red heart, noto style"};
    options.seed = 7;
    options.plan = sparvar::AttentionPlan::preset("csla", model.layers, static_cast<int>(model.schedule.size()));
    options.on_progress = [](const sparvar::Progress& p) { std::cerr << p.done << '/' << p.total << '\r'; };

    const sparvar::GenerateResult result = pipeline.generate(options);
    sparvar::write_png(argc > 2 ? argv[2] : "picture.png", result.pictures.front().image);
    std::cout << model.backend << ": " << result.total_seconds << " s\n";
  } catch (const sparvar::Error& error) {
    std::cerr << "draw: " << error.what() << '\n';
    return 1;
  }
}
